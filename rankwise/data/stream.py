"""A packed micro-batch: documents one behind the other, no padding, each blind to its neighbours.

What several documents have in common at their beginning (a system prompt, an instruction, a context that many
questions are asked about) stands in the stream once: it is the same computation for all of them.  The stream is cut
into segments; a document is a segment, or a chain of them, the last its own.

Shape letters: N tokens of the stream, G segments, D documents, S supervised tokens.  A supervised token is predicted by
the position before it, so the model's output is read at `sources` and compared with `targets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rankwise.data.corpus import Corpus

LEAST_SHARED = 16  # tokens: a shorter common beginning is not worth a segment


@dataclass(frozen=True)
class Stream:
    """Documents of a corpus laid out to be computed together.

    Attributes:
        documents: int64 `[D]`, their numbers in the corpus.
        tokens: int64 `[N]`.
        positions: int64 `[N]`, from 0 in each document.
        bounds: G + 1 offsets; segment i is `bounds[i]` up to `bounds[i + 1]`.
        after: G numbers, which segment each one continues, or -1; those that continue one follow it at once.
        holders: G numbers, a document that each is part of.
        sources: int64 `[S]`, positions whose next token is supervised; in a shared segment once for each document.
        targets: int64 `[S]`, those next tokens.
        owners: int64 `[S]`, which of the D documents each belongs to, ascending.
    """

    documents: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    bounds: tuple[int, ...]
    after: tuple[int, ...]
    holders: tuple[int, ...]
    sources: np.ndarray
    targets: np.ndarray
    owners: np.ndarray

    @property
    def size(self) -> int:
        return self.bounds[-1]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each segment, int64 `[G]`."""
        return np.diff(self.bounds)


def lay(corpus: Corpus, documents: Sequence[int] | np.ndarray, runs: Sequence[int] | None = None) -> Stream:
    """The named documents as one stream.

    Args:
        corpus: where they are.
        documents: their numbers; a segment of its own for each, in this order, if nothing is shared.
        runs: how many documents, one group after the other, may share what they have in common: those that go through
            one adapter.  None: nothing is shared.
    """
    pieces = [corpus.document(int(number)) for number in documents]
    segments = _Segments([tokens for tokens, _ in pieces])
    ends = np.cumsum(runs if runs is not None else np.ones(len(pieces), dtype=np.int64))
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        segments.grow(list(range(begin, end)))
    predicted = [np.flatnonzero(mask) for _, mask in pieces]
    places = [np.concatenate(parts) for parts in segments.places]
    return Stream(
        documents=np.asarray(documents, dtype=np.int64),
        tokens=np.concatenate(segments.tokens).astype(np.int64),
        positions=np.concatenate(segments.positions),
        bounds=tuple(segments.bounds),
        after=tuple(segments.after),
        holders=tuple(segments.holders),
        sources=np.concatenate([place[at - 1] for place, at in zip(places, predicted, strict=True)]),
        targets=np.concatenate([t[at] for (t, _), at in zip(pieces, predicted, strict=True)]).astype(np.int64),
        owners=np.repeat(np.arange(len(pieces)), [len(at) for at in predicted]),
    )


@dataclass
class _Segments:
    """A stream as it grows; `places` are, for each document, where its tokens stand, a piece for each segment."""

    documents: list[np.ndarray]
    tokens: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    after: list[int] = field(default_factory=list)
    holders: list[int] = field(default_factory=list)
    places: list[list[np.ndarray]] = field(init=False)

    def __post_init__(self) -> None:
        self.places = [[] for _ in self.documents]

    def grow(self, members: list[int], at: int = 0, after: int = -1) -> None:
        """Lays documents that are alike up to token `at`, which segment `after` ends with."""
        for alike in self._groups(members, at):
            stop = self._common(alike) if len(alike) > 1 else len(self.documents[alike[0]])
            segment = len(self.after)
            self.tokens.append(self.documents[alike[0]][at:stop])
            self.positions.append(np.arange(at, stop))
            self.after.append(after)
            self.holders.append(alike[0])
            begin = self.bounds[-1]
            self.bounds.append(begin + stop - at)
            for member in alike:
                self.places[member].append(np.arange(begin, begin + stop - at))
            if len(alike) > 1:
                self.grow(alike, stop, segment)

    def _groups(self, members: list[int], at: int) -> list[list[int]]:
        """Documents that go on alike for long enough, and each other one by itself; in order of their first."""
        found: dict[object, list[int]] = {}
        for member in members:
            begins = self.documents[member][at : at + LEAST_SHARED + 1]  # one token more, to be its own
            shared = len(begins) > LEAST_SHARED
            found.setdefault(begins[:LEAST_SHARED].tobytes() if shared else member, []).append(member)
        return list(found.values())

    def _common(self, members: list[int]) -> int:
        """How many tokens they have in common, so that each keeps at least one."""
        first = self.documents[members[0]]
        stop = min(len(self.documents[member]) for member in members) - 1
        for member in members[1:]:
            differs = np.flatnonzero(self.documents[member][:stop] != first[:stop])
            stop = int(differs[0]) if len(differs) else stop
        return stop
