"""RMS normalisation with a frozen weight: y = x / rms(x) · (offset + weight).  arXiv:1910.07467, equation 4.

`offset` is 0 for Llama's form and 1 for Gemma's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.kernels.library import native, serves


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Normalises the last dimension of `x`, `[..., width]`; `weight` `[width]` is a constant."""
    if serves(x, weight):
        return _NativeNorm.apply(x.contiguous(), weight.detach().contiguous(), eps, offset)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (offset + weight.detach().float())).to(x.dtype)


class _NativeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        width = x.shape[-1]
        rows = x.numel() // width
        y, inverse = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        native().norm_forward(  # type: ignore[union-attr]
            *(t.data_ptr() for t in (x, weight, y, inverse)), rows, width, eps, offset
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad, grad_x = grads[0].contiguous(), torch.empty_like(x)
        native().norm_backward(  # type: ignore[union-attr]
            *(t.data_ptr() for t in (grad, x, weight, inverse, grad_x)), len(inverse), x.shape[-1], ctx.offset
        )
        return grad_x, None, None, None
