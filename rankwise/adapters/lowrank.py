"""What an adapter does to one weight W `[O, I, *K]`, of any number of dimensions.

    form lora    W + s·B·A                                  arXiv:2106.09685, equation 3
    form dora    m ∘ (W + s·B·A) / ‖W + s·B·A‖              arXiv:2402.09353, equation 5, norms by output
    form adalora W + s·B·Λ·A, Λ diagonal                    arXiv:2303.10512, equation 3, with P for B and Q for A

Of form `adalora` single directions (a column of B, a number of Λ, a row of A) can be left out, for a while or for good.
A residual start (PiSSA, OLoRA) has factors A₀ and B₀ that are not zero, and the base is never changed for it: what
was there at the start is taken off again, so B·A above stands for B·A - B₀·A₀.

Shape letters: O outputs, I inputs, R rank, K the kernel of a convolution (none for linear layers and embeddings).
An embedding is the linear map from one-hot words to vectors: I words, O features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.adapters.product import low_rank_product
from rankwise.adapters.scaling import Scaling, alpha_of, effective_scale
from rankwise.kernels.codes import Coded, Weight, dense


@dataclass(frozen=True)
class SiteShape:
    """The weight of a site as mathematics has it, whatever its layout in memory: `[O, I, *K]`."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Elements of a row of A."""
        return self.inputs * math.prod(self.kernel)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A, `[R, I, *K]`, and of B, `[O, R, *1]`."""
        return (rank, self.inputs, *self.kernel), (self.outputs, rank, *(1 for _ in self.kernel))

    def parameters(self, rank: int) -> int:
        A, B = self.factor_shapes(rank)
        return torch.Size(A).numel() + torch.Size(B).numel()


class LowRank(nn.Module):
    """One site's factors: float32 masters A and B, the factor s, the dropout of the branch, and what a form adds.

    Args:
        A, B: `[R, I, *K]` and `[O, R, *1]`.
        m: magnitudes `[O]` of form `dora`.
        lam: the diagonal of Λ `[R]` of form `adalora`.
        residual: whether A and B as they are now are to be taken off.

    Attributes:
        kept: of form `adalora`, which directions take part, ascending; None for all.
    """

    A0: Tensor | None
    B0: Tensor | None
    squares: Tensor | None
    kept: Tensor | None

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float = 0.0,
        *,
        m: Tensor | None = None,
        lam: Tensor | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        A, B = A.contiguous(), B.contiguous()  # whatever a decomposition gave; moments must lie in memory as these do
        self.register_buffer("A0", A.clone() if residual else None)
        self.register_buffer("B0", B.clone() if residual else None)
        self.register_buffer("squares", None, persistent=False)
        self.register_buffer("kept", None, persistent=False)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.m = None if m is None else nn.Parameter(m)
        self.lam = None if lam is None else nn.Parameter(lam)
        self.scale = scale
        # Draws nothing: it is where other tools look for dropout, as TRL does to switch it off for DPO.
        self.drop = nn.Dropout(dropout) if dropout else None

    @property
    def dropout(self) -> float:
        """The probability with which an input element of the branch is zeroed in training."""
        return 0.0 if self.drop is None else self.drop.p

    @property
    def rank(self) -> int:
        """Of what is trained; `plain` has twice as much after a residual start, and none of what is left out."""
        return self.A.shape[0]

    @property
    def empty(self) -> bool:
        """Whether no direction is left to go through."""
        return not (self.rank if self.kept is None else len(self.kept))

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.B.shape[0], self.A.shape[1], tuple(self.A.shape[2:]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole low-rank part, Λ or residual included; autograd reaches the parameters through them."""
        if self.lam is not None:
            B, lam = self._taking_part(self.B, 1), self._taking_part(self.lam, 0)
            return self._taking_part(self.A, 0), B * lam.view(1, -1, *(1 for _ in B.shape[2:]))
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    def _taking_part(self, parameter: Tensor, dim: int) -> Tensor:
        return parameter if self.kept is None else parameter.index_select(dim, self.kept)

    def prefix(self, rank: int, scaling: Scaling) -> tuple[Tensor, Tensor, float]:
        """A and B of the first so many directions, and the factor that `scaling` gives them; of form `lora`.

        Where there are no more than that, all of them.  Autograd reaches the parameters through them.
        """
        if rank >= self.rank:
            return self.A, self.B, self.scale
        alpha = alpha_of(scaling, self.scale, self.rank)
        return self.A[:rank], self.B[:, :rank], effective_scale(scaling, alpha, rank)

    def plain(self) -> LowRank:
        """The same in A and B alone, as every tool can read it; the rank may be 0."""
        if self.A0 is None and self.lam is None:
            return self
        A, B = (factor.detach() for factor in self.factors())
        return LowRank(A, B, self.scale, self.dropout, m=None if self.m is None else self.m.detach())

    @torch.no_grad()
    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s·B·A, `[O, I, *K]`."""
        A, B = (factor.to(dtype) for factor in self.factors())
        return (B.flatten(1) @ A.flatten(1)).mul_(self.scale).unflatten(1, A.shape[1:])

    @torch.no_grad()
    def delta_norm(self) -> float:
        """‖s·B·A‖ (Frobenius) from two R × R Gram matrices: ‖B·A‖² = ⟨BᵀB, AAᵀ⟩; no `[O, I]` matrix is made."""
        A, B = (factor.double().flatten(1) for factor in self.factors())
        return abs(self.scale) * float(((B.t() @ B) * (A @ A.t())).sum().clamp(min=0).sqrt())

    # ── form adalora ─────────────────────────────────────────────────────────────────────────────────────────────

    def leave_out_all_but(self, kept: Tensor) -> None:
        """For a while: what is left out keeps its place and can come back."""
        self.kept = None if len(kept) == self.rank else kept.to(self.A.device)

    @torch.no_grad()
    def remove_what_is_left_out(self) -> None:
        """For good, the tensors themselves: of the same parameters, whose gradients are 0 again."""
        if self.kept is None or self.lam is None:
            return
        for name, dim in (("A", 0), ("B", 1), ("lam", 0)):
            parameter = self.get_parameter(name)
            reached, parameter.grad = parameter.grad is not None, None
            parameter.data = self._taking_part(parameter, dim)
            parameter.grad = torch.zeros_like(parameter) if reached else None
        self.kept = None

    # ── form dora ────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def meet(self, weight: Tensor) -> None:
        """Takes in what never changes of the base's weight, `[O, I, *K]`, before the first `norms`."""
        if self.m is not None:
            self.squares = row_squares(weight)

    @torch.no_grad()
    def norms(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """‖W + s·B·A‖ by output, `[O]`: a constant to the gradient, as in the paper's §4.3.

        ‖W‖² + 2s⟨B, W·Aᵀ⟩ + s²·⟨B·(A·Aᵀ), B⟩ by rows: no matrix of the size of W is made.  `dtype` is that
        of the layer's products.
        """
        known = row_squares(dense(weight, dtype)) if self.squares is None else self.squares
        A, B = (factor.flatten(1).to(known.dtype) for factor in self.factors())
        cross = _through(weight, A.to(dtype)).to(B.dtype)
        squares = known + 2 * self.scale * (B * cross).sum(1) + self.scale**2 * ((B @ (A @ A.t())) * B).sum(1)
        return squares.clamp(min=0).sqrt()

    @torch.no_grad()
    def applied(self, weight: Tensor) -> Tensor:
        """What W `[O, I, *K]` becomes, computed in its own type."""
        changed = weight + self.delta(weight.dtype)
        if self.m is None:
            return changed
        gain = gains(self.m.to(weight.dtype), changed.flatten(1).norm(dim=1))
        return changed * gain.view(-1, *(1 for _ in weight.shape[1:]))

    @torch.no_grad()
    def changes_nothing(self) -> bool:
        """Whether W stays W; of form `dora` it can be told only after `meet`."""
        if self.delta_norm():
            return False
        return self.m is None or (
            self.squares is not None and bool(torch.allclose(self.m, self.squares.sqrt().float()))
        )


def _through(weight: Weight, A: Tensor) -> Tensor:
    """W·Aᵀ, `[O, R]`."""
    return low_rank_product(A, weight, None, ()).t() if isinstance(weight, Coded) else weight.flatten(1) @ A.t()


def gains(m: Tensor, norms: Tensor) -> Tensor:
    """M / ‖W + s·B·A‖ by output; 1 for outputs whose weights are all zero, which no factor changes."""
    return torch.where(norms > 0, m / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1.0)


def row_squares(weight: Tensor) -> Tensor:
    """‖W‖² by output of a weight `[O, I, *K]`, in float32 or float64: what magnitudes begin as the root of."""
    wide = weight.detach().flatten(1)
    return (wide if wide.dtype == torch.float64 else wide.float()).square().sum(1)
