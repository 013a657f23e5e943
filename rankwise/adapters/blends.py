"""What the changes of one site become together: ΔW₁, ΔW₂, …, each s·B·A of form `lora`, and a weight w for each.

    added    Σ w·ΔW, exactly: factors side by side
    linear   (Σ √|w·s|·B)·(Σ ±√|w·s|·A): has cross terms, and is not the sum
    ties     arXiv:2306.01708, algorithm 1: trim, elect a sign, mean of those that agree
    dare     arXiv:2311.03099: drop entries by chance, rescale the rest; then the sum, or the mean by elected sign
    knots    arXiv:2410.19735: U·Σ·[V₁ᵀ V₂ᵀ …] = [w₁·ΔW₁ w₂·ΔW₂ …] by SVD; ties among the Σ·Vᵢᵀ, and U before it

`added`, `knots` and cutting either to a rank need matrices of the factors' own size alone.  What `ties` and `dare` make
is of no low rank: it is made as a matrix `[O, I·K]`, four of which are held at once however many changes there are.

Shape letters: O outputs, I inputs, R rank, K the kernel of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank, SiteShape
from rankwise.adapters.parts import parts_of

Changes = Sequence[tuple[float, LowRank]]  # weights, none of them 0, and plain factors of one shape
Matrices = Callable[[], Iterator[Tensor]]  # the same `[O, I·K]`, one for each change, as often as they are asked for


@dataclass(frozen=True)
class Blend:
    """What is kept, and how far from what was meant.

    Attributes:
        factors: what is kept.
        missed: ‖ΔW meant - ΔW kept‖, of Frobenius.
        meant: ‖ΔW meant‖.
    """

    factors: LowRank
    missed: float
    meant: float


def _gains(changes: Changes) -> list[float]:
    return [weight * factors.scale for weight, factors in changes]


def _dropout(changes: Changes) -> float:
    """For training further: what all have, else none."""
    known = {factors.dropout for _, factors in changes}
    return known.pop() if len(known) == 1 else 0.0


def _shape(changes: Changes) -> SiteShape:
    return changes[0][1].shape


@torch.no_grad()
def added(changes: Changes) -> LowRank:
    """The sum; the factors are the very ones that came where every w·s is the same.  Else B has them, in float64."""
    gains, dropout = _gains(changes), _dropout(changes)
    A = torch.cat([factors.A for _, factors in changes])
    if len(set(gains)) == 1 and gains[0] > 0:  # a scale is never negative in a file
        return LowRank(A, torch.cat([factors.B for _, factors in changes], dim=1), gains[0], dropout)
    scaled = [gain * factors.B.double() for gain, (_, factors) in zip(gains, changes, strict=True)]
    return LowRank(A.double(), torch.cat(scaled, dim=1), 1.0, dropout)


@torch.no_grad()
def linear(changes: Changes) -> Blend:
    """Factors added up, all of one rank; `missed` is how far that is from the sum."""
    rooted = [(gain, abs(gain) ** 0.5, own) for gain, (_, own) in zip(_gains(changes), changes, strict=True)]
    A = torch.stack([math.copysign(root, gain) * own.A.double() for gain, root, own in rooted]).sum(0)
    B = torch.stack([root * own.B.double() for _, root, own in rooted]).sum(0)
    factors, whole = LowRank(A, B, 1.0, _dropout(changes)), added(changes)
    return Blend(factors, added([(1.0, factors), (-1.0, whole)]).delta_norm(), whole.delta_norm())


@torch.no_grad()
def nearest(whole: LowRank, rank: int) -> Blend:
    """The change of at most so low a rank that comes nearest: the first singular triplets, found in the factors."""
    norm = whole.delta_norm()
    if whole.rank <= rank:
        return Blend(whole, 0.0, norm)
    parts = parts_of(whole)
    kept = min(rank, len(parts))
    return Blend(parts.only(range(kept)), float(parts.values[kept:].double().norm()), norm)


@torch.no_grad()
def nearest_to(matrix: Tensor, shape: SiteShape, rank: int, dropout: float) -> Blend:
    """The same of a matrix `[O, I·K]`, through eigenvectors of its smaller Gram matrix."""
    wide = matrix.double()
    tall = wide.shape[0] > wide.shape[1]
    side = wide.t() if tall else wide
    basis = torch.linalg.eigh(side @ side.t())[1][:, -rank:].flip(1)  # ascending
    rest = basis.t() @ side
    missed = float((side - basis @ rest).norm())
    even = rest.norm(dim=1).sqrt()  # each direction's norm is shared between A and B
    left, right = basis * even, rest / even.clamp(min=torch.finfo(even.dtype).tiny)[:, None]
    A, B = (left.t(), right.t()) if tall else (right, left)
    shape_A, shape_B = shape.factor_shapes(A.shape[0])
    return Blend(LowRank(A.reshape(shape_A), B.reshape(shape_B), 1.0, dropout), missed, float(wide.norm()))


def ties(changes: Changes, rank: int, density: float) -> Blend:
    """Trimmed at each site by itself."""
    matrices = _matrices(changes, lambda number, matrix: trimmed(matrix, density))
    return nearest_to(elected_mean(matrices), _shape(changes), rank, _dropout(changes))


def dare(changes: Changes, rank: int, density: float, seeds: Sequence[int], *, elect: bool) -> Blend:
    """A seed for each change; `elect` for `dare-ties`."""

    def dropped(number: int, matrix: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seeds[number])
        return matrix * (torch.rand(matrix.shape, generator=generator) < density) / density

    matrices = _matrices(changes, dropped)
    whole = elected_mean(matrices) if elect else _summed(matrices)
    return nearest_to(whole, _shape(changes), rank, _dropout(changes))


@torch.no_grad()
def knots(changes: Changes, rank: int, density: float) -> Blend:
    """Of the rank of all factors together before it is cut; U's columns that are nothing are left out."""
    columns = [gain * own.B.double().flatten(1) for gain, (_, own) in zip(_gains(changes), changes, strict=True)]
    rows = [own.A.double().flatten(1) for _, own in changes]
    basis, core = torch.linalg.qr(torch.cat(columns, dim=1))
    blocks = core.split([len(A) for A in rows], dim=1)
    cores = [block @ torch.linalg.qr(A.t())[1].t() for block, A in zip(blocks, rows, strict=True)]
    turn, values, _ = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    if not values[0]:
        return nearest(added(changes), rank)
    turn = turn[:, values > values[0] * len(values) * torch.finfo(values.dtype).eps]
    shared = [turn.t() @ block @ A for block, A in zip(blocks, rows, strict=True)]
    merged = elected_mean(lambda: (trimmed(one, density) for one in shared))
    shape_A, shape_B = _shape(changes).factor_shapes(len(merged))
    A, B = merged.reshape(shape_A), (basis @ turn).reshape(shape_B)
    return nearest(LowRank(A, B, 1.0, _dropout(changes)), rank)


# ── matrices ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _matrices(changes: Changes, change: Callable[[int, Tensor], Tensor]) -> Matrices:
    """W·ΔW of each, changed: made anew every time, so that there is one of them at a time."""

    def found() -> Iterator[Tensor]:
        for number, (weight, factors) in enumerate(changes):
            yield change(number, factors.delta().flatten(1) * weight)

    return found


def _summed(matrices: Matrices) -> Tensor:
    total: Tensor | None = None
    for matrix in matrices():
        total = matrix if total is None else total + matrix
    assert total is not None
    return total


def trimmed(matrix: Tensor, density: float) -> Tensor:
    """A matrix with its largest entries by absolute value, at least one; all of those that are as large as the last."""
    size, count = matrix.abs(), max(1, round(density * matrix.numel()))
    last = size.flatten().kthvalue(matrix.numel() - count + 1).values
    return torch.where(size >= last, matrix, 0.0)


def elected_mean(matrices: Matrices) -> Tensor:
    """Entry by entry the mean of those that have the sign of the sum; 0 where the sum is 0."""
    signs = _summed(matrices).sign_()
    total, votes = torch.zeros_like(signs), torch.zeros_like(signs)
    for matrix in matrices():
        agrees = matrix.sign() == signs  # where the sum is 0, those that are 0 agree on 0
        total += torch.where(agrees, matrix, 0.0)
        votes += agrees
    return total / votes.clamp(min=1)
