"""Nested ranks: an adapter whose first r directions are an adapter too, for every r, so that the rank is chosen later.

Documents of a step go through prefixes of the adapter, each document through one, so a step costs what a plain one
does (DyLoRA, arXiv:2210.07558, takes one prefix for the whole step).  In the mean over all the chance

    L = ½·L(R) + ¼·L(1) + ¼·mean over r of L(r),   r in {2, 4, 8, …} below R

and every step has all three kinds, if it has four documents: the full rank and the smallest are never left out, as in
the sandwich rule of slimmable networks (arXiv:1903.05134).  Where there is nothing between, the smallest has all
of the other half.  L(r) is the loss of the plain adapter A[:r], B[:, :r] with the factor that the spec's scaling gives
rank r for the same alpha: a prefix is no more and no less than the adapter of that rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rankwise.surgery.bank import Bank
from rankwise.surgery.routing import Way

_FULL = 0.5  # share of the documents at the full rank; the rest is shared evenly


@dataclass(frozen=True)
class Lesson:
    """Documents of a step, int64 `[D]`, and the way through an adapter on which they are learnt."""

    way: Way
    documents: np.ndarray

    def among(self, documents: np.ndarray) -> Lesson:
        """Of these documents, and in their order, those that it has."""
        return Lesson(self.way, documents[np.isin(documents, self.documents)])


class Nested:
    """Of one adapter in training.

    Args:
        bank, name: which.
        seed: of the chance; which prefix a document takes follows from it, the step, and the step's documents alone.

    Attributes:
        ranks: whose prefixes learn, ascending: 1, 2, 4, … and the adapter's own, its largest site's.

    Raises:
        SpecError: the adapter's first directions are no adapter by themselves.
    """

    def __init__(self, bank: Bank, name: str, seed: int) -> None:
        adapter = bank.adapter(name)
        adapter.check_divisible(name)
        self.seed = seed
        self.ranks = nested_grid(max((factors.rank for factors in adapter.sites.values()), default=1))
        self._full: Way = name
        self._parts = [bank.prefix(name, rank) for rank in self.ranks[:-1]]

    def lessons(self, step: int, documents: np.ndarray) -> list[Lesson]:
        """How the documents of a step, from 0, are learnt."""
        if not self._parts:
            return [Lesson(self._full, documents)]
        generator = np.random.Generator(np.random.PCG64([self.seed, step]))
        least, *between = self._parts
        ways = [self._full, least, *([between[generator.integers(len(between))]] if between else [])]
        rest = (1 - _FULL) / (len(ways) - 1)
        ends = np.cumsum([_FULL] + [rest] * (len(ways) - 2))
        # Systematic sampling: shares that are right in the mean, and as even in each step as its documents allow.
        places = (np.arange(len(documents)) + generator.random()) / len(documents)
        taken = np.searchsorted(ends, places, side="right")
        shuffled = generator.permutation(documents)
        return [Lesson(way, shuffled[taken == i]) for i, way in enumerate(ways)]


def nested_grid(rank: int) -> tuple[int, ...]:
    """The ranks at which an adapter of some rank is trained.

    >>> nested_grid(1), nested_grid(8), nested_grid(12)
    ((1,), (1, 2, 4, 8), (1, 2, 4, 8, 12))
    """
    return (*(2**i for i in range((rank - 1).bit_length())), rank)
