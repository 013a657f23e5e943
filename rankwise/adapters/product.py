"""The fused low-rank product: one pass over the frozen weight, then each segment of rows through its own A and B.

    y[n] = gain ∘ (x[n]·Wᵀ + s·(drop(x[n])·Aᵀ)·Bᵀ) + bias        for the rows n of a segment

Shape letters: N rows, I inputs, O outputs, R rank.  W is [O, I], A [R, I], B [O, R], gain [O] or none.

What makes it fast and light (accounting in docs/engine.md): the low-rank part is added into the output of the base
product; no gradient of W is ever made; nothing of the size of y is kept but, under a gain, y; A and B are float32
masters, rounded to the activations' type for the products only; both parts of dX meet in one buffer.

The compiled path (kernels/lowrank.c) does the same in one call each way.  It rounds once where torch's own product and
an addition to it round twice, so it is taken only where that is wanted: while the engine holds a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.kernels.codes import Coded, Weight, dense
from rankwise.kernels.gain import gain_gradients, scale_columns
from rankwise.kernels.lowrank import Part, backward_product, forward_product, serves_product


def low_rank_product(
    x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[Part], *, compiled: bool = False
) -> Tensor:
    """`[..., I]` → `[..., O]`; rows are counted over the leading dimensions, flattened.

    Rows in no part pass through the base alone.  `weight` and `bias` are constants.  `compiled` lets the compiled path
    be taken where it serves these tensors; without it, rows of the base alone are to the bit what `F.linear` gives.
    A weight in codes is made whole for the product and again for its gradient, or, compiled, never.  Under autocast all
    takes place in its type.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight if isinstance(weight, Coded) else weight.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return low_rank_product(x, weight, bias, parts, compiled=compiled)
    compiled = (compiled or isinstance(weight, Coded)) and serves_product(x, weight, bias, parts)
    factors = [t for part in parts for t in (part.A, part.B, part.gain)]
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in factors)):
        product = _CompiledProduct if compiled else _LowRankProduct
        return product.apply(x, weight, bias, tuple(parts), *factors)
    if compiled:
        return forward_product(x.reshape(-1, x.shape[-1]), weight, bias, parts)[0].view(*x.shape[:-1], -1)
    return _forward(x, weight, bias, parts, [])


def _dropped(x: Tensor, part: Part) -> Tensor:
    return x if part.keep is None else x.mul(part.keep).mul_(1 / (1 - part.dropout))


def _forward(x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[Part], kept: list[Tensor]) -> Tensor:
    """Adds to `kept`, for each part: A and B as the products saw them, and the shrink."""
    y = F.linear(x, dense(weight, x.dtype), bias)  # the very call of the base: a fresh adapter changes no bit
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for part in parts:
        rows = slice(part.start, part.stop)
        A, B = part.A.detach().to(x.dtype), part.B.detach().to(x.dtype)
        shrink = _dropped(flat_x[rows], part) @ A.t()
        flat_y[rows].addmm_(shrink, B.t(), alpha=part.scale)
        if part.gain is not None:
            scale_columns(flat_y[rows], part.gain.detach(), bias)
        kept += (A, B, shrink)
    return y


class _LowRankProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, parts: tuple[Part, ...], *factors: Tensor | None
    ) -> Tensor:
        kept: list[Tensor] = []
        y = _forward(x, weight, bias, parts, kept)
        gains = [part.gain for part in parts]
        # The gradient of a gain needs what the gain was applied to, which y itself tells.
        ctx.weight = weight
        ctx.save_for_backward(x, bias, y if any(g is not None for g in gains) else None, *gains, *kept)
        ctx.parts = [(part.start, part.stop, part.scale, part.dropout, part.keep) for part in parts]
        ctx.master = [factor.dtype if factor is not None else None for factor in factors]
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,) = grads
        count = len(ctx.parts)
        if g is None:
            return (None,) * (4 + 3 * count)
        x, bias, y, *kept = ctx.saved_tensors
        gains, kept, shape = kept[:count], kept[count:], x.shape
        x, g = x.reshape(-1, shape[-1]), g.reshape(-1, g.shape[-1])
        g, d_gains = _through_gains(g, y, bias, ctx.parts, gains)  # a gain's gradient has its type
        dx = g @ dense(ctx.weight, g.dtype) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for i, (start, stop, scale, dropout, keep) in enumerate(ctx.parts):
            A, B, shrink = kept[3 * i : 3 * i + 3]
            rows, part = slice(start, stop), Part(start, stop, A, B, scale, dropout, keep)
            d_shrink = (g[rows] @ B).mul_(scale)
            needs_A, needs_B = ctx.needs_input_grad[4 + 3 * i : 6 + 3 * i]
            found.append((d_shrink.t() @ _dropped(x[rows], part)).to(ctx.master[3 * i]) if needs_A else None)
            found.append((shrink.t() @ g[rows]).t().to(ctx.master[3 * i + 1]).mul_(scale) if needs_B else None)
            found.append(d_gains[i])
            if dx is None:
                continue
            if keep is None:
                dx[rows].addmm_(d_shrink, A)
            else:
                dx[rows].add_(_dropped(d_shrink @ A, part))
        return (None if dx is None else dx.view(shape), None, None, None, *found)


class _CompiledProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, parts: tuple[Part, ...], *factors: Tensor | None
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, shrinks = forward_product(flat, weight, bias, parts)
        kept_y = y if any(part.gain is not None for part in parts) else None
        ctx.weight = weight
        ctx.save_for_backward(flat if parts else None, bias, kept_y, *factors, *shrinks)
        ctx.parts = parts
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,) = grads
        count = len(ctx.parts)
        if g is None:
            return (None,) * (4 + 3 * count)
        x, bias, y, *kept = ctx.saved_tensors
        dx, found = backward_product(
            g.reshape(-1, g.shape[-1]),
            x,
            y,
            ctx.weight,
            bias,
            ctx.parts,
            kept[3 * count :],
            for_x=ctx.needs_input_grad[0],
        )
        gains = kept[2 : 3 * count : 3]
        of_parts = [
            grad
            for (dA, dB, applied), gain in zip(found, gains, strict=True)
            for grad in (dA, dB, None if applied is None else torch.where(gain == 0, 0, applied / gain))
        ]
        return (None if dx is None else dx.view(ctx.shape), None, None, None, *of_parts)


def _through_gains(
    g: Tensor, y: Tensor | None, bias: Tensor | None, parts: Sequence[Any], gains: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient of what the gains were applied to, `[N, O]`, and of each gain."""
    if y is None:
        return g, [None] * len(gains)
    flat_y, through = y.reshape(g.shape), torch.empty_like(g, memory_format=torch.contiguous_format)
    found: list[Tensor | None] = []
    done = 0
    for (start, stop, *_), gain in zip(parts, gains, strict=True):
        through[done:start] = g[done:start]
        done = stop
        if gain is None:
            through[start:stop] = g[start:stop]
            found.append(None)
        else:
            found.append(gain_gradients(g[start:stop], flat_y[start:stop], gain, bias, through[start:stop]))
    through[done:] = g[done:]
    return through, found
