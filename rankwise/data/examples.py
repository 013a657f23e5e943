"""What training and evaluation read, of whatever task: documents with a length, and so many items that are judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Self = TypeVar("Self", bound="Examples")


class Examples(ABC):
    """Documents in a row, numbered from 0.  How they go through a model is the engine's (`engine/tasks`).

    Attributes:
        origins: int64 `[D, 2]`, index into `files` and line (or row) number from 1; 0 where the file is all of it.
        files: names of the files the documents come from.
    """

    origins: np.ndarray
    files: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Tokens that each document puts through a model, int64 `[D]`: what a step and its pieces are measured by."""

    @abstractmethod
    def supervised_counts(self) -> np.ndarray:
        """Items of each document whose loss counts, int64 `[D]`, at least one."""

    @abstractmethod
    def subset(self: Self, indices: Sequence[int] | np.ndarray) -> Self:
        """The named documents, in that order."""

    @abstractmethod
    def content(self, i: int) -> bytes:
        """What a model is given of a document.  Those with the same content never stand on two sides of a split."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of what is learnt; not of where it came from."""

    def origin(self, i: int) -> str:
        """Where a document stands: `train.jsonl:17`."""
        file, line = self.origins[i]
        return f"{self.files[file]}:{line}" if line else self.files[file]

    def drawn(self: Self, step: int) -> Self:
        """As they are learnt at a step (from 0), however it is cut: most tasks learn the same at every step."""
        return self
