"""A low-rank change as a sum of parts of rank one, each of which can be left out by itself.

    s·B·A = Q·C·Vᵀ = Σ λₖ·uₖ·vₖᵀ,  Q and V orthonormal

Taken apart through its core C, of the adapter's own size, R × R; nothing of the size of W is made.  The parts are the
singular triplets of C where all that comes in and goes out counts alike.  What counts can be told by two roots: with G
of L = G·Gᵀ for what goes out and N of M = N·Nᵀ for what comes in, parts are taken from the singular triplets of
Gᵀ·C·N, and of all sums of K parts the first K come nearest to C between these roots (the weighted low-rank
approximation of Eckart and Young).  With M = E[(Vᵀ·x)(Vᵀ·x)ᵀ] alone that is nearest to s·B·A·x over the inputs x that
M was measured on.

Shape letters: O outputs, I inputs, R rank, K the kernel of a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank, SiteShape


@dataclass(frozen=True)
class Core:
    """A site's change between orthonormal bases of its outputs and its inputs; float64.

    Attributes:
        shape: of the site.
        left: Q, `[O, P]`, P ≤ R: no more columns than the site has outputs, nor than it has inputs.
        core: C, `[P, S]`, S ≤ R and no more than there are inputs.
        right: V, `[I·K, S]`.
        dropout: of the branch.
    """

    shape: SiteShape
    left: Tensor
    core: Tensor
    right: Tensor
    dropout: float = 0.0

    def trainable(self) -> LowRank:
        """The change with Q for its B and C·Vᵀ for its A, so that the gradient of C is that of A times V."""
        return LowRank(*_shaped(self.shape, (self.core @ self.right.t()).float(), self.left.float()), 1.0)

    @torch.no_grad()
    def parts(self, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Parts:
        """The P parts.

        Args:
            outputs: G `[P, P]`, see above; with an inverse.
            inputs: N `[S, S]`; where it has none, parts are as many all the same, and what N does not see is in them.

        Raises:
            RuntimeError: G has no inverse.
        """
        seen = self.core if outputs is None else outputs.t() @ self.core
        turn, does, _ = torch.linalg.svd(seen if inputs is None else seen @ inputs, full_matrices=False)
        back = turn if outputs is None else torch.linalg.solve(outputs.t(), turn)
        rows = turn.t() @ seen @ self.right.t()
        longer, norms = back.norm(dim=0), rows.norm(dim=1)
        left = self.left @ (back / longer)
        right = rows / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
        left, values, right, weights = (part.float() for part in (left, longer * norms, right, does.square()))
        return Parts(self.shape, left.contiguous(), values, right.contiguous(), weights, self.dropout)


@dataclass(frozen=True)
class Parts:
    """The parts of one site, the one that does most first; R of them, fewer than the rank where it is narrow; float32.

    Attributes:
        shape: of the site.
        left: uₖ, `[O, R]`, of norm one; orthonormal unless what goes out was told apart.
        values: λₖ, `[R]`, not negative: the norm of each part.
        right: vₖᵀ, `[R, I·K]`, of norm one; a part that is zero has zeros.
        weights: `[R]`, the square of what each part does: of its singular value, see above.
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
        """All of them in form `adalora`, to be measured: Λ is λ, which directions take part can be said at any time."""
        return LowRank(*_shaped(self.shape, self.right, self.left), 1.0, lam=self.values.clone())

    def only(self, kept: Sequence[int]) -> LowRank:
        """Some of them as plain A and B with factor 1, each part's norm shared evenly between the two."""
        at = torch.as_tensor(list(kept), dtype=torch.long)
        roots = self.values[at].sqrt()
        factors = _shaped(self.shape, roots[:, None] * self.right[at], self.left[:, at] * roots)
        return LowRank(*factors, 1.0, self.dropout)


def _shaped(shape: SiteShape, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as the site has them, of `[R, I·K]` and `[O, R]`."""
    shape_A, shape_B = shape.factor_shapes(len(right))
    return right.reshape(shape_A), left.reshape(shape_B)


@torch.no_grad()
def core_of(factors: LowRank) -> Core:
    """The core of a site's change.

    Args:
        factors: of form `lora`; other forms by their `plain`.
    """
    A, B = (factor.detach().cpu().double().flatten(1) for factor in factors.factors())
    left, own = torch.linalg.qr(factors.scale * B)
    right, other = torch.linalg.qr(A.t())
    core = own @ other.t()
    if core.shape[0] > core.shape[1]:  # some of what B could say is never said
        turn, core = torch.linalg.qr(core)
        left = left @ turn
    return Core(factors.shape, left, core, right, factors.dropout)


def parts_of(factors: LowRank) -> Parts:
    """The singular triplets of a site's change, of form `lora`; other forms by their `plain`."""
    return core_of(factors).parts()
