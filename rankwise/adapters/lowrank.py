"""Form `lora`: ΔW = s·B·A (arXiv:2106.09685, equation 3), for weights of any number of dimensions.

Shape letters: O outputs, I inputs, R rank, K the kernel of a convolution (none for linear layers and embeddings).
An embedding is the linear map from one-hot words to vectors: I words, O features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SiteShape:
    """The weight of a site as mathematics has it, whatever its layout in memory: `[O, I, *K]`."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A, `[R, I, *K]`, and of B, `[O, R, *1]`."""
        return (rank, self.inputs, *self.kernel), (self.outputs, rank, *(1 for _ in self.kernel))

    def parameters(self, rank: int) -> int:
        A, B = self.factor_shapes(rank)
        return torch.Size(A).numel() + torch.Size(B).numel()


class LowRank(nn.Module):
    """One site's factors: float32 masters A and B, the factor s, and the dropout of the branch."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.dropout = dropout

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.B.shape[0], self.A.shape[1], tuple(self.A.shape[2:]))

    @torch.no_grad()
    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW, `[O, I, *K]`."""
        A, B = self.A.to(dtype).flatten(1), self.B.to(dtype).flatten(1)
        return (B @ A).mul_(self.scale).unflatten(1, self.A.shape[1:])

    @torch.no_grad()
    def delta_norm(self) -> float:
        """‖ΔW‖ (Frobenius) from the two R × R Gram matrices: ‖B·A‖² = ⟨BᵀB, AAᵀ⟩; no `[O, I]` matrix is made."""
        A, B = self.A.double().flatten(1), self.B.double().flatten(1)
        return abs(self.scale) * float(((B.t() @ B) * (A @ A.t())).sum().clamp(min=0).sqrt())
