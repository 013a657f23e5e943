"""Which documents make up each optimiser step, and how a step is cut into micro-batches.

Both are functions of the lengths, the seed and the step alone, so resuming needs no more than a step number.
"""

from __future__ import annotations

import numpy as np


class Order:
    """Epoch after epoch of shuffled documents, cut into steps.

    Args:
        lengths: tokens of each document.
        seed: of the shuffling; each epoch has its own permutation.
        batch_tokens: a step takes documents for as long as their tokens do not exceed this, but at least one.
        batch_documents: or, a step takes so many documents, whatever their length.
    """

    def __init__(self, lengths: np.ndarray, seed: int, batch_tokens: int, batch_documents: int | None = None) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed, self.batch_tokens, self.batch_documents = seed, batch_tokens, batch_documents
        self._epochs: list[list[np.ndarray]] = []

    def epoch(self, number: int) -> list[np.ndarray]:
        """The steps of one epoch, each an array of document numbers."""
        while len(self._epochs) <= number:
            generator = np.random.Generator(np.random.PCG64([self.seed, len(self._epochs)]))
            self._epochs.append(self._cut(generator.permutation(len(self.lengths))))
        return self._epochs[number]

    def step(self, number: int) -> tuple[int, np.ndarray]:
        """The epoch a step (from 0) falls in, and its documents."""
        epoch = 0
        while number >= len(self.epoch(epoch)):
            number -= len(self.epoch(epoch))
            epoch += 1
        return epoch, self.epoch(epoch)[number]

    def steps(self, epochs: float) -> int:
        """How many steps so many epochs take; a part of an epoch counts by its share of the steps, rounded up."""
        whole = sum(len(self.epoch(e)) for e in range(int(epochs)))
        part = epochs - int(epochs)
        return whole + int(np.ceil(part * len(self.epoch(int(epochs))) - 1e-9)) if part else whole

    def _cut(self, documents: np.ndarray) -> list[np.ndarray]:
        if self.batch_documents is not None:
            return [documents[i : i + self.batch_documents] for i in range(0, len(documents), self.batch_documents)]
        steps, start, held = [], 0, 0
        for i, length in enumerate(self.lengths[documents]):
            if i > start and held + length > self.batch_tokens:
                steps.append(documents[start:i])
                start, held = i, 0
            held += int(length)
        return [*steps, documents[start:]]


def micro_batches(documents: np.ndarray, lengths: np.ndarray, micro_tokens: int) -> list[np.ndarray]:
    """A step's documents dealt into as few even micro-batches as `micro_tokens` allows, longest documents first.

    A document longer than `micro_tokens` makes a micro-batch of its own.  `lengths` are of the whole corpus.
    """
    own = lengths[documents]
    count = max(1, int(np.ceil(own.sum() / micro_tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        held = np.zeros(count, dtype=np.int64)
        for i in np.argsort(-own, kind="stable"):
            emptiest = int(held.argmin())
            bins[emptiest].append(int(documents[i]))
            held[emptiest] += own[i]
        fits = all(total <= micro_tokens or len(held_by) == 1 for total, held_by in zip(held, bins, strict=True))
        if fits or count >= len(documents):
            return [np.array(b, dtype=np.int64) for b in bins if b]
        count += 1
