"""A packed micro-batch: documents one behind the other, no padding, each blind to its neighbours.

Shape letters: N tokens of the stream, D documents, S supervised tokens.  A supervised token is predicted by the
position before it, so the model's output is read at `sources` and compared with `targets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.data.corpus import Corpus


@dataclass(frozen=True)
class Stream:
    """Documents of a corpus laid end to end.

    Attributes:
        documents: int64 `[D]`, their numbers in the corpus.
        tokens: int64 `[N]`.
        positions: int64 `[N]`, from 0 in each document.
        bounds: D + 1 offsets; document i is `bounds[i]` up to `bounds[i + 1]`.
        sources: int64 `[S]`, positions whose next token is supervised.
        targets: int64 `[S]`, those next tokens.
        owners: int64 `[S]`, which of the D documents each belongs to.
    """

    documents: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    bounds: tuple[int, ...]
    sources: np.ndarray
    targets: np.ndarray
    owners: np.ndarray

    @property
    def size(self) -> int:
        return self.bounds[-1]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)


def lay(corpus: Corpus, documents: Sequence[int] | np.ndarray) -> Stream:
    """The named documents as one stream, in this order."""
    pieces = [corpus.document(int(number)) for number in documents]
    bounds = np.cumsum([0, *(len(tokens) for tokens, _ in pieces)])
    tokens = np.concatenate([tokens for tokens, _ in pieces]).astype(np.int64)
    supervised = np.concatenate([mask for _, mask in pieces])
    predicted = np.flatnonzero(supervised)
    return Stream(
        documents=np.asarray(documents, dtype=np.int64),
        tokens=tokens,
        positions=np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds)),
        bounds=tuple(int(b) for b in bounds),
        sources=predicted - 1,
        targets=tokens[predicted],
        owners=np.searchsorted(bounds, predicted, side="right") - 1,
    )
