"""Starting values of A and B.

One of the two is zero, so that training starts at the base, to the bit; or both are taken from the weight (residual
starts), and what they are at the start is taken off again (`adapters/lowrank.py`), so that it starts there to rounding.

Kaiming: A uniform within ±1/√fan_in, as loralib (`kaiming_uniform_` with a = √5).  Gaussian: A normal with deviation
1/r, as PEFT.  Embeddings turn it round, as loralib does: a word's row of A is looked up, so A starts at zero and B is
standard normal, under either name.

LoftQ (arXiv:2310.08659) with one step: B·A is the best of its rank for what rounding the base took away, so that
training starts nearer to the base as it was; nothing is taken off, and the base in its codes stays as it is.
PiSSA (arXiv:2404.02948): the R largest singular triplets, W ≈ s·B·A with B = U·√(S/s), A = √(S/s)·Vᵀ.
OLoRA (arXiv:2406.01775): W = Q·R, B the first columns of Q, A the first rows of R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.adapters.lowrank import SiteShape
from rankwise.errors import SpecError

RESIDUAL_STARTS = ("pissa", "olora")


def start(
    init: str, shape: SiteShape, rank: int, generator: torch.Generator, *, lookup: bool = False
) -> tuple[Tensor, Tensor]:
    """A and B, float32 in main memory, drawn from `generator` alone; `lookup` for embeddings."""
    shape_A, shape_B = shape.factor_shapes(rank)
    if lookup:
        return torch.zeros(shape_A), torch.randn(shape_B, generator=generator)
    if init == "gaussian":
        A = torch.randn(shape_A, generator=generator) / rank
    else:
        bound = 1 / math.sqrt(shape.width)
        A = torch.empty(shape_A).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(shape_B)


def triplet_start(init: str, shape: SiteShape, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B of form `adalora`, neither of them zero: Λ is.

    Kaiming: rows of A and columns of B uniform, of expected norm 1/√3.  Gaussian: both normal with deviation 0.02, as
    the paper's implementation.
    """
    found = []
    for size, fan in zip(shape.factor_shapes(rank), (shape.width, shape.outputs), strict=True):
        drawn = torch.empty(size)
        if init == "gaussian":
            found.append(drawn.normal_(std=0.02, generator=generator))
        else:
            found.append(drawn.uniform_(-(fan**-0.5), fan**-0.5, generator=generator))
    return found[0], found[1]


def weight_start(init: str, weight: Tensor, rank: int, scale: float, path: str) -> tuple[Tensor, Tensor]:
    """A and B of a residual start, float32 in main memory, from a weight `[O, I, *K]`; computed in float64.

    Raises:
        SpecError: the weight has fewer singular values than the rank asks for; names the site.
    """
    flat = weight.detach().flatten(1).cpu().double()
    if rank > min(flat.shape):
        raise SpecError(
            f"{path}: init {init!r} takes rank {rank} out of a weight of {flat.shape[0]} × {flat.shape[1]}",
            hint=f"at most rank {min(flat.shape)} there (rank_pattern), or another init",
        )
    if init == "pissa":
        left, values, right = _largest_triplets(flat, rank)
        roots = (values / scale).sqrt()
        A, B = roots[:, None] * right, left * roots
    else:
        Q, R = torch.linalg.qr(flat)
        A, B = R[:rank], Q[:, :rank]
    return A.float().reshape(rank, *weight.shape[1:]), B.float().reshape(-1, rank, *(1 for _ in weight.shape[2:]))


@dataclass(frozen=True, eq=False)
class Remainder:
    """The largest part of what rounding took away from a weight: W - rounded(W) ≈ B·A, the largest direction first.

    A is `[R, I]`, B `[O, R]`, float32 in main memory.
    """

    A: Tensor
    B: Tensor


def remainder_of(lost: Tensor, rank: int) -> Remainder:
    """Of what was lost, `[O, I]`, as many directions as there are, at most `rank`."""
    left, values, right = _largest_triplets(lost.detach().cpu().double(), min(rank, *lost.shape))
    roots = values.sqrt()
    return Remainder((roots[:, None] * right).float().contiguous(), (left * roots).float().contiguous())


def remainder_start(remainder: Remainder | None, rank: int, scale: float, path: str) -> tuple[Tensor, Tensor]:
    """A and B of init `loftq`.

    Raises:
        SpecError: no remainder of that rank was kept when the base was loaded; names the site.
    """
    kept = 0 if remainder is None else len(remainder.A)
    if remainder is None or rank > kept:
        raise SpecError(
            f"{path}: init 'loftq' takes rank {rank} out of what rounding took away, of which rank {kept} was kept",
            hint=f"load the base in int8 or nf4 with remainder_rank={rank}; a dense base has lost nothing",
        )
    return remainder.A[:rank] / scale**0.5, remainder.B[:, :rank] / scale**0.5


def _largest_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U `[O, R]`, S `[R]`, Vᵀ `[R, I]` by eigenvectors of the smaller Gram matrix: sooner than an SVD."""
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = _largest_triplets(matrix.t(), rank)
        return right.t(), values, left.t()
    _, vectors = torch.linalg.eigh(matrix @ matrix.t())  # in ascending order
    left = vectors[:, -rank:].flip(1)
    projected = left.t() @ matrix
    values = projected.norm(dim=1)
    return left, values, projected / values.clamp(min=1e-30)[:, None]
