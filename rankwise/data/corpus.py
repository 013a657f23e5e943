"""Tokenised documents, laid flat: what training and evaluation read.

Shape letters: T tokens in all, D documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rankwise.data.examples import Examples


@dataclass(frozen=True, eq=False)
class Corpus(Examples):
    """Documents one behind the other, none empty; the arrays may be memory-mapped and are never written to.

    Attributes:
        tokens: int32 `[T]`.
        supervised: bool `[T]`; True where the token is a training target, predicted from those before it.  Never True
            for a document's first token, which nothing precedes.
        bounds: int64 `[D + 1]`; document i is `tokens[bounds[i]:bounds[i + 1]]`.
        origins: int64 `[D, 2]`, index into `files` and line (or row) number from 1.
        files: names of the files the documents come from.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    bounds: np.ndarray
    origins: np.ndarray
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of one document, as views."""
        begin, end = self.bounds[i], self.bounds[i + 1]
        return self.tokens[begin:end], self.supervised[begin:end]

    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 `[D]`."""
        return np.diff(self.bounds)

    def supervised_counts(self) -> np.ndarray:
        """Training targets of each document, int64 `[D]`."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self.supervised, self.bounds[:-1], dtype=np.int64)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Corpus:
        """The named documents, in that order, as copies."""
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        lengths = self.lengths()[chosen]
        bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # Where each token of the result stands here: its document's begin plus its place in the document.
        places = np.arange(bounds[-1]) + np.repeat(self.bounds[:-1][chosen] - bounds[:-1], lengths)
        return Corpus(self.tokens[places], self.supervised[places], bounds, self.origins[chosen], self.files)

    def content(self, i: int) -> bytes:
        """Its tokens."""
        return np.ascontiguousarray(self.document(i)[0]).tobytes()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is trained on: tokens, mask and bounds; not of where it came from."""
        sha = hashlib.sha256()
        for array in (self.tokens, self.supervised, self.bounds):
            sha.update(f"{array.dtype.str}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()
