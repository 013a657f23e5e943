"""The nouns of `allocation` in search.json: ranks given out by layer, and what they were compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import FiniteFloat, PositiveInt

from rankwise.reports.run import Delta


@dataclass(frozen=True)
class Spent:
    """Parameters of one rank everywhere, and of ranks given out by layer."""

    uniform: PositiveInt
    allocated: PositiveInt


@dataclass(frozen=True)
class Arm:
    """`uniform`, `allocated`, or the same ranks `shuffled`; `delta` is to `uniform`, on documents to choose by."""

    name: str
    parameters: PositiveInt
    status: str
    loss: FiniteFloat | None
    delta: Delta | None


@dataclass(frozen=True)
class Against:
    """What decides: the allocation against the uniform rank, and against the distribution of shuffled ones."""

    uniform: Delta
    shuffled: Delta


@dataclass(frozen=True)
class Allocation:
    """Ranks given out by layer.

    Attributes:
        ranks: of each layer.
        agreement: of two halves of the documents about the ranks, Spearman's; below `least` nothing is trained.
        seeds: with which each was trained.
        points, against: empty, and None, where nothing was tried.
        confirmed: against the uniform rank on documents that no choice looked at; of one that was recommended.
        sentence: what is to be said of it.
    """

    by: Literal["activations", "gradients"]
    rank: PositiveInt
    ranks: dict[str, PositiveInt]
    agreement: FiniteFloat | None
    least: FiniteFloat
    parameters: Spent
    seeds: PositiveInt
    verdict: Literal["recommended", "not recommended", "not confirmed", "not reliable", "nothing to give out"]
    points: tuple[Arm, ...]
    against: Against | None
    sentence: str
    confirmed: Delta | None = None
