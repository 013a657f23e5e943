"""Rows taken in one by one: read, rendered, tokenised in batches, written out, and every one of them counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rankwise.data.fields import shape_among
from rankwise.data.problems import Problems
from rankwise.data.reading import Reading, Sized
from rankwise.data.row import Row
from rankwise.data.store import CorpusWriter
from rankwise.data.template import TemplateRefusedError
from rankwise.data.tokeniser import Tokenised
from rankwise.errors import DataError

Overlong = Literal["truncate", "drop"]

_NOTHING_SAID = "no assistant turn to train"
_TOO_LONG = "longer than max_length"
_CUT_OFF = "no trained token within max_length"
_NOTHING_LEFT = "no trained token"
# A batch is large enough to keep all cores busy and small enough to forget.
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 128, 300_000


@dataclass(frozen=True)
class Report:
    """What became of the rows.

    Attributes:
        rows: how many were read.
        documents: kept; one row may become several (see `Template.render`).
        tokens, supervised: of the kept documents; those trained.
        truncated: kept documents that lost their end.
        dropped: reason → documents (or rows without any) left out.
        shapes: shape → rows (see `Reading.shapes`).
        unused: field → rows in which it was there and means nothing to that shape.
        files: source → SHA-256 of its bytes.
    """

    rows: int
    documents: int
    tokens: int
    supervised: int
    truncated: int
    dropped: dict[str, int]
    shapes: dict[str, int]
    unused: dict[str, int]
    files: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Intake:
    """Where rows go in and documents come out, `max_length` tokens long at the most.

    Args:
        reading: what rows say, and how it is tokenised.
        max_length: tokens of a document.
        overlong: whether a longer document is cut at its end or left out.
        writer: takes the documents.
        problems: takes what is wrong; from the first problem on rows are only checked.
    """

    def __init__(
        self, reading: Reading, max_length: int, overlong: Overlong, writer: CorpusWriter, problems: Problems
    ) -> None:
        self._reading, self._max_length, self._overlong = reading, max_length, overlong
        self._writer, self._problems = writer, problems
        self._waiting: list[tuple[Sized, tuple[int, int]]] = []
        self._characters = 0
        self.rows = 0
        self._count: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._shapes: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()

    def take(self, file: int, row: Row) -> bool:
        """One row of the numbered file.  True when a batch has been written, a good moment to show progress."""
        self.rows += 1
        document = self._reading.read(row, self._problems)
        shapes = self._reading.shapes
        shape = shape_among(shapes, row.fields)
        if document is None or shape is None:
            return False
        self._shapes[shape] += 1
        self._unused.update(key for key in row.fields if key not in shapes[shape].fields)
        try:
            drafts = self._reading.drafts(document)
        except TemplateRefusedError as error:
            self._problems.add(row.origin, error.message, hint=error.hint)
            return False
        if not drafts:
            self._dropped[_NOTHING_SAID] += 1
        self._waiting += [(draft, (file, row.origin.line)) for draft in drafts]
        self._characters += sum(draft.size for draft in drafts)
        if len(self._waiting) < _BATCH_DOCUMENTS and self._characters < _BATCH_CHARACTERS:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Tokenises and writes what is waiting."""
        waiting, self._waiting, self._characters = self._waiting, [], 0
        if self._problems or not waiting:
            return
        found = self._reading.encode([draft for draft, _ in waiting], self._max_length)
        for document, (_, origin) in zip(found, waiting, strict=True):
            self._keep(document, origin)

    def _keep(self, document: Tokenised, origin: tuple[int, int]) -> None:
        tokens, supervised, overlong = document.tokens, document.supervised, not document.whole
        if overlong and self._overlong == "drop":
            self._dropped[_TOO_LONG] += 1
        elif not supervised.any():
            self._dropped[_CUT_OFF if overlong else _NOTHING_LEFT] += 1
        else:
            self._writer.append(tokens, supervised, origin)
            self._count.update(
                documents=1, tokens=len(tokens), supervised=int(supervised.sum()), truncated=int(overlong)
            )

    def report(self, files: dict[str, str]) -> Report:
        """The counts, once every row has been taken and flushed.

        Raises:
            DataError: the list of problems; or nothing is left to train on, and why.
        """
        self._problems.check()
        if not self._count["documents"]:
            raise DataError(self._emptiness(list(files)), hint=self._way_out())
        return Report(
            self.rows,
            self._count["documents"],
            self._count["tokens"],
            self._count["supervised"],
            self._count["truncated"],
            dict(self._dropped),
            dict(self._shapes),
            dict(self._unused),
            files,
        )

    def _emptiness(self, files: list[str]) -> str:
        where = ", ".join(files)
        if not self.rows:
            return f"{where}: there is not one row"
        reasons = [f"{count:,} × {reason}" for reason, count in self._dropped.items()]
        return f"{where}: nothing is left to train on of {self.rows:,} rows: {', '.join(reasons)}"

    def _way_out(self) -> str:
        if not self.rows:
            return "the file is empty, or holds only a header"
        if self._dropped[_TOO_LONG] or self._dropped[_CUT_OFF]:
            return f"raise max_length (it is {self._max_length}) or shorten the rows"
        return self._reading.needs
