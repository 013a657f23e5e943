"""Form `dora`'s gain: the columns of a product scaled in place, and the two gradients of that in one pass.

y[n] = gain ∘ (z[n] - bias) + bias           z[n], bias and gain [O]; gain in float32 or wider
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.kernels.library import native, serves


def scale_columns(y: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    """Puts y in the place of z, `[N, O]` with rows next to each other; a gain of 1 changes no bit."""
    offset = None if bias is None else ((1 - gain) * bias.detach()).contiguous()
    if serves(y) and gain.dtype == torch.float32:
        gain = gain.contiguous()
        native().gain_forward(  # type: ignore[union-attr]
            y.data_ptr(), gain.data_ptr(), None if offset is None else offset.data_ptr(), *y.shape
        )
        return
    wide = y * gain  # in the gain's type, rounded once
    y.copy_(wide if offset is None else wide.add_(offset))


def gain_gradients(g: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, dz: Tensor) -> Tensor:
    """The gradient of the gain, `[O]`; that of z is written to `dz`.

    What the gain was applied to is (y - bias) / gain; where a gain is 0 nothing of it is left, and its gradient is 0.
    """
    if serves(g, y, dz) and gain.dtype == torch.float32 and bias is None:
        g, gain, sums = g.contiguous(), gain.contiguous(), torch.empty_like(gain)
        done = native().gain_backward(  # type: ignore[union-attr]
            *(t.data_ptr() for t in (g, y, gain, dz, sums)), *g.shape
        )
        if not done:
            raise torch.OutOfMemoryError("no memory for the gradient of a magnitude")
    else:
        wide = g.to(gain.dtype)
        sums = (wide * (y if bias is None else y - bias.detach())).sum(0)
        dz.copy_(wide.mul_(gain) if wide is not g else wide * gain)
    return torch.where(gain == 0, 0, sums / gain)
