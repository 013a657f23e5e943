"""Rotary position embedding: each pair (x[i], x[i + width/2]) turned by its token's angle.  arXiv:2104.09864, eq. 34.

Shape letters: B batch, H heads, N tokens, D width of a head.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from rankwise.kernels.library import native, serves


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x * cos + rotate_half(x) * sin` in the memory layout of `x`.

    Args:
        x: `[B, H, N, D]`.
        cos, sin: `[B or 1, N, D]`.
    """
    if serves_rotary(x, cos, sin):
        return _NativeRotary.apply(x, cos.contiguous(), sin.contiguous())
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def serves_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the compiled kernel takes these: cosines and sines are constants to it, and as wide as a head."""
    return (
        serves(x, cos, sin)
        and x.dim() == 4
        and x.stride(3) == 1
        and x.shape[3] % 2 == 0
        and cos.shape == sin.shape
        and cos.shape in ((len(x), *x.shape[2:]), (1, *x.shape[2:]))
        and not (cos.requires_grad or sin.requires_grad)
    )


class _NativeRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = torch.empty_like(x)
        ctx.save_for_backward(cos, sin)
        ctx.strides = y.stride()
        _turn(x, y, cos, sin, backward=False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(3) == 1 else grads[0].contiguous()
        grad_x = grad.new_empty_strided(grad.shape, ctx.strides)
        _turn(grad, grad_x, cos, sin, backward=True)
        return grad_x, None, None


def _turn(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> None:
    strides = ((ctypes.c_int64 * 4)(*t.stride()) for t in (x, y))
    shared = len(cos) == 1
    native().rotary(  # type: ignore[union-attr]
        *(t.data_ptr() for t in (x, y, cos, sin)), *strides, 0 if shared else cos.stride(0), *x.shape, backward
    )
