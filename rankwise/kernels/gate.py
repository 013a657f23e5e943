"""Gated activation: act(gate) ∘ up, as in SwiGLU and GeGLU feed-forward layers (arXiv:2002.05202, equation 5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.kernels.library import native, serves

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
_CODES = {"silu": 0, "gelu_tanh": 1}  # rowwise.c, SILU and GELU_TANH


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` for two tensors of one shape; `activation` is a key of `ACTIVATIONS`."""
    if serves(gate, up):
        return _NativeGate.apply(gate.contiguous(), up.contiguous(), _CODES[activation])
    return ACTIVATIONS[activation](gate) * up


class _NativeGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, code: int) -> Tensor:
        y = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        ctx.code = code
        native().gate_forward(*(t.data_ptr() for t in (gate, up, y)), y.numel(), code)  # type: ignore[union-attr]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad, grad_gate, grad_up = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        native().gate_backward(  # type: ignore[union-attr]
            *(t.data_ptr() for t in (grad, gate, up, grad_gate, grad_up)), grad.numel(), ctx.code
        )
        return grad_gate, grad_up, None
