"""A low-rank change as a sum of parts of rank one, each of which can be left out by itself.

    s·B·A = Σ λₖ·uₖ·vₖᵀ,  uₖ orthonormal

Taken apart through matrices of the adapter's own size, R × R; none of the size of W is made.  With `root` L of
M = E[(A·x)(A·x)ᵀ] = L·Lᵀ, the parts are those of the layer's outputs: of all sums of K parts, the first K come nearest
to s·B·A·x over the inputs x that M was measured on (the weighted low-rank approximation of Eckart and Young).  Without
it every input counts alike, and they are the singular triplets of s·B·A.

Shape letters: O outputs, I inputs, R rank, K the kernel of a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank, SiteShape


@dataclass(frozen=True)
class Parts:
    """The parts of one site, the one that does most first; float32.

    Attributes:
        shape: of the site.
        left: uₖ, `[O, R]`.
        values: λₖ, `[R]`, not negative: the norm of each part.
        right: vₖᵀ, `[R, I·K]`, of norm one; a part that is zero has zeros.
        weights: `[R]`, the square of what each part does: ‖λₖ·vₖᵀ·x‖² in the mean, or λₖ² without a root.
        dropout: of the branch.
    """

    shape: SiteShape
    left: Tensor
    values: Tensor
    right: Tensor
    weights: Tensor
    dropout: float = 0.0

    def __len__(self) -> int:
        return len(self.values)

    @property
    def parameters(self) -> int:
        """Of each part."""
        return self.shape.parameters(1)

    def switchable(self) -> LowRank:
        """All of them in form `adalora`: Λ is λ, and which directions take part can be said at any time."""
        A, B = self._shaped(self.right, self.left)
        return LowRank(A, B, 1.0, self.dropout, lam=self.values.clone())

    def only(self, kept: Sequence[int]) -> LowRank:
        """Some of them as plain A and B with factor 1, each part's norm shared evenly between the two."""
        at = torch.as_tensor(list(kept), dtype=torch.long)
        roots = self.values[at].sqrt()
        return LowRank(*self._shaped(roots[:, None] * self.right[at], self.left[:, at] * roots), 1.0, self.dropout)

    def _shaped(self, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        shape_A, shape_B = self.shape.factor_shapes(len(right))
        return right.reshape(shape_A), left.reshape(shape_B)


@torch.no_grad()
def parts_of(factors: LowRank, root: Tensor | None = None) -> Parts:
    """The parts of a site's change.

    Args:
        factors: of form `lora`; other forms by their `plain`.
        root: L `[R, R]`, see above.
    """
    A, B = (factor.detach().cpu().double().flatten(1) for factor in factors.factors())
    basis, core = torch.linalg.qr(factors.scale * B)
    seen = torch.linalg.qr(A.t())[1].t() if root is None else root.detach().cpu().double()
    turn, does, _ = torch.linalg.svd(core @ seen)
    rows = turn.t() @ core @ A
    norms = rows.norm(dim=1)
    right = rows / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
    left, values, right, weights = (part.float() for part in (basis @ turn, norms, right, does.square()))
    return Parts(factors.shape, left.contiguous(), values, right.contiguous(), weights, factors.dropout)
