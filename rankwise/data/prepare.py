"""From sources to a corpus, once: what was tokenised is kept by content and found again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from rankwise.cache import cache_folder
from rankwise.data.examples import Examples
from rankwise.data.intake import Intake, Overlong, Report
from rankwise.data.problems import Problems
from rankwise.data.reading import Reading
from rankwise.data.rows import ending, is_file, read_rows
from rankwise.data.store import SCHEMA, CorpusWriter, open_corpus
from rankwise.errors import DataError

# Called now and then with rows done and the share (0 to 1) of all bytes read.
Progress = Callable[[int, float], None]
_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Prepared:
    """Documents and what became of the rows.  `reused` says that they were found and not made."""

    corpus: Examples
    report: Report
    reused: bool


def prepare(
    sources: str | Path | Sequence[str | Path],
    reading: Reading,
    max_length: int,
    *,
    split: str = "train",
    overlong: Overlong = "truncate",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Reads and tokenises every row; memory does not grow with their number.

    The result lies in the cache under a name made of the sources' bytes, the reading, the options and the versions of
    the libraries, and is used again when all of these are the same.  A damaged entry is made anew.

    Args:
        sources: one or more files or hub data sets (see `read_rows`).
        reading: what rows say to the model to be trained: its `Template`, or that of another task.
        max_length: tokens of a document at the most.
        split: of hub data sets.
        overlong: a longer document loses its end (`truncate`) or is left out (`drop`); both are counted.
        cache: folder; by default `~/.cache/rankwise/tokens`, and where that cannot be written a temporary one.
        progress: see `Progress`.

    Raises:
        DataError: lists every bad row; or nothing is left to train on; or the cache cannot be written.
    """
    named = [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    _check(named, max_length, overlong)
    files = {source: _digest(source, split) for source in named}
    key = _key(files, [*reading.key, max_length, overlong])
    folder = (cache or cache_folder() / "tokens") / key
    show = progress or _silent
    with suppress(DataError):  # no entry, or a damaged one
        found = _opened(folder, files, reading, reused=True)
        show(found.report.rows, 1.0)
        return found
    problems = Problems()
    try:
        with CorpusWriter(folder) as writer:
            intake = Intake(reading, max_length, overlong, writer, problems)
            _read_all(named, split, intake, problems, show)
            writer.finish(named, intake.report(files).to_json())
    except OSError as error:
        raise DataError(
            f"{folder.parent}: the tokens cannot be written: {error}", hint="free some space or name another cache"
        ) from None
    return _opened(folder, files, reading, reused=False)


def _check(sources: Sequence[str], max_length: int, overlong: str) -> None:
    twice = [source for source, times in Counter(sources).items() if times > 1]
    problems = [
        *(["no source is named"] if not sources else []),
        *(f"{source} is named twice" for source in twice),
        *([f"max_length = {max_length}, expected at least 2"] if max_length < 2 else []),
        *([f"overlong = {overlong!r}, expected truncate or drop"] if overlong not in get_args(Overlong) else []),
    ]
    if problems:
        raise DataError("; ".join(problems))


def _silent(rows: int, share: float) -> None:
    """No progress is shown."""


def _read_all(sources: Sequence[str], split: str, intake: Intake, problems: Problems, show: Progress) -> None:
    weights = [Path(source).stat().st_size if is_file(source) else 1 for source in sources]
    for i, source in enumerate(sources):
        for row in read_rows(source, split, problems):
            if intake.take(i, row):
                show(intake.rows, (sum(weights[:i]) + weights[i] * row.read) / max(1, sum(weights)))
    intake.flush()
    show(intake.rows, 1.0)


def _opened(folder: Path, files: dict[str, str], reading: Reading, reused: bool) -> Prepared:
    corpus, facts = open_corpus(folder)
    examples = reading.examples(replace(corpus, files=tuple(files)))
    counts = {"tokens": int(examples.lengths().sum()), "supervised": int(examples.supervised_counts().sum())}
    # The same bytes may have been read under another name.
    try:
        report = Report(**facts | {"files": files} | counts)
    except TypeError as error:  # of a version that counted other things
        raise DataError(f"{folder}: not a stored corpus: {error}") from None
    return Prepared(examples, report, reused)


def _key(files: dict[str, str], options: list[object]) -> str:
    kinds = [ending(Path(name)) for name in files]
    libraries = [version("rankwise"), version("transformers"), version("tokenizers")]
    content = json.dumps([SCHEMA, list(files.values()), kinds, options, libraries])
    return hashlib.sha256(content.encode()).hexdigest()[:40]


def _digest(source: str, split: str) -> str:
    """SHA-256 of a file's bytes, or of a hub data set's rows."""
    sha = hashlib.sha256()
    if not is_file(source):
        for row in read_rows(source, split):
            sha.update(json.dumps(row.fields, sort_keys=True, default=str).encode())
        return sha.hexdigest()
    try:
        with Path(source).open("rb") as file:
            while block := file.read(_BLOCK):
                sha.update(block)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error}") from None
    return sha.hexdigest()
