"""Leading directions: of a matrix too large to be taken apart, and of rows that come in pieces.

Randomised subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1); incremental
principal components with a moving mean (Ross, Lim, Lin and Yang 2008).  Signs are fixed: the largest entry of each
right vector is positive.

Shape letters: N rows, I columns, K directions kept, Q directions searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 4


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis `[N, Q]` of what columns `[N, Q]`, Q ≤ N, span; where they span less, of more than that."""
    return torch.linalg.qr(columns)[0]


def random_directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows `[Q, I]`, float32 in main memory."""
    return orthonormal(torch.randn(width, count, generator=generator)).t().contiguous()


def triplets_within(basis: Tensor, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[N, Q]`, S `[Q]`, Vᵀ `[Q, I]` of a matrix M, from a basis `[N, Q]` of its leading left space and basisᵀ·M.

    Both sides are orthonormal whatever the rank of M: it is taken apart by QR first, and then as `[Q, Q]`.
    """
    right_basis, core = torch.linalg.qr(projected.t())
    left, values, right = torch.linalg.svd(core.t())
    right = right @ right_basis.t()
    signs = _signs(right)
    return basis @ left * signs, values, right * signs[:, None]


def leading_triplets(matrix: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The `count` largest singular values of `[N, I]` and their right vectors, `[K]` and `[K, I]`; at most min(N, I).

    Twice as many are searched for; where there are no more than that, the result is exact.
    """
    width = min(2 * count, *matrix.shape)
    rows = random_directions(width, matrix.shape[1], generator).to(matrix)
    for _ in range(_ROUNDS if width < matrix.shape[1] else 0):
        rows = orthonormal(matrix.t() @ orthonormal(matrix @ rows.t())).t()
    _, values, right = triplets_within(*_projected(matrix, rows))
    return values[:count], right[:count]


def _projected(matrix: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    basis = orthonormal(matrix @ rows.t())
    return basis, basis.t() @ matrix


def _signs(right: Tensor) -> Tensor:
    """For each row, ±1: the sign of its largest entry."""
    largest = right.gather(1, right.abs().argmax(1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0).to(right)


class Principal:
    """The directions in which rows `[N, I]` vary most about their mean, as they come in piece by piece.

    Memory is that of K rows and of the piece at hand.

    Attributes:
        rows: how many have come.
        directions: `[K, I]`, orthonormal, the strongest first; K is `most`, or less while fewer rows have come.
        agreement: `[K]`, the cosine of each direction with what it was before the last piece; 0 where it is new.
    """

    def __init__(self, most: int, generator: torch.Generator) -> None:
        self.most, self.generator = most, generator
        self.rows = 0
        self.directions = self.agreement = self._values = self._mean = torch.empty(0)
        self._spread = 0.0  # Σ over rows and columns of (x - mean)²

    @property
    def shares(self) -> list[float]:
        """The part of the whole variance that each direction has, largest first."""
        return [value**2 / self._spread if self._spread else 0.0 for value in self._values.tolist()]

    def take(self, piece: Tensor) -> None:
        """Rows `[N, I]`, N ≥ 1; computed in float32, or in float64 where they are."""
        x = piece if piece.dtype == torch.float64 else piece.float()
        mean = x.mean(0)
        centred = x - mean
        spread = float(centred.square().sum())
        if not self.rows:
            self._mean, self._spread = mean, spread
            self._turn(centred)
        else:
            before, now = self.rows, self.rows + len(x)
            apart = self._mean - mean  # what both means' distance adds is one more row
            weight = before * len(x) / now
            self._spread += spread + weight * float(apart.square().sum())
            self._mean = self._mean + (mean - self._mean) * (len(x) / now)
            self._turn(torch.cat([self._values[:, None] * self.directions, centred, weight**0.5 * apart[None]]))
        self.rows += len(x)

    def _turn(self, rows: Tensor) -> None:
        old = self.directions
        self._values, self.directions = leading_triplets(rows, self.most, self.generator)
        self.agreement = self._values.new_zeros(len(self._values))
        same = min(len(old), len(self._values))
        if same:
            self.agreement[:same] = (self.directions[:same] * old[:same]).sum(1)
