"""Attention over a packed stream in which every document sees only itself.

Shape letters: N tokens of the stream, H query heads, G key-value heads (G divides H), D width of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.kernels.library import Heads, Layout, product, serves
from rankwise.kernels.sizes import LANES


@dataclass(frozen=True)
class Spans:
    """Where the segments of a stream lie: segment i is tokens `bounds[i]` up to `bounds[i + 1]`.

    It sees itself and, where `after[i]` is not -1, the segment that it continues, and so on: what several documents
    have in common at their beginning stands in the stream once.  Segments that continue one, or continue one that does,
    follow it at once.  Without `after` every segment is a document by itself.
    """

    bounds: tuple[int, ...]
    after: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def chains(self) -> list[list[tuple[int, int]]]:
        """Of each segment, where all that it sees lies, in order, itself last."""
        own = list(pairwise(self.bounds))
        found: list[list[tuple[int, int]]] = []
        for i, span in enumerate(own):
            before = self.after[i] if self.after else -1
            found.append([*(found[before] if before >= 0 else []), span])
        return found

    @cached_property
    def c_bounds(self) -> Any:
        return _integers(self.bounds)

    @cached_property
    def c_after(self) -> Any:
        return _integers(self.after or [-1] * self.count)


def _integers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """Attention of each document to itself.

    Args:
        q: `[N, H, D]`; k, v: `[N, G, D]`.  Head h uses key-value head `h // (H / G)`.
        spans: the segments of the stream; together they cover all N tokens.
        scale: factor of the scores.
        window: how many tokens a token sees, itself included; 0 for all before it.
        softcap: scores x become softcap · tanh(x / softcap), as in Gemma 2; 0 for none.
        causal: a token sees itself and what stands before it; without, its whole document, and no window.

    Returns:
        `[N, H, D]`.
    """
    if serves(q, k, v) and not softcap and _alike(q, k, v):
        return _NativeAttention.apply(q, k, v, spans, scale, window, causal)
    return torch.cat([_attend_alone(q, k, v, chain, scale, window, softcap, causal) for chain in spans.chains])


def _alike(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the C side, which is told one shape for all, reads these within their bounds.

    Latent attention (DeepSeek's MLA) has values of another width than its keys.
    """
    shared = q.shape[0] == k.shape[0] and k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    same = q.shape[2] == k.shape[2] and q.shape[2] % 16 == 0
    return shared and same and all(x.stride(2) == 1 for x in (q, k, v))


def _attend_alone(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chain: Sequence[tuple[int, int]],
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
) -> Tensor:
    """One segment, the last of the chain, to all of it."""
    start, stop = chain[-1]
    own, seen = stop - start, sum(b - a for a, b in chain)
    queries = q[start:stop].transpose(0, 1).unsqueeze(0)
    keys, values = (_joined(x, chain).transpose(0, 1).unsqueeze(0) for x in (k, v))
    blind = q.device.type == "cpu" and seen < LANES  # torch's CPU kernel turns NaN into 0 in less than a vector
    mask = None
    if softcap or blind or (causal and (seen > own or 0 < window < seen)):
        before = seen - own
        mask = torch.ones(own, seen, dtype=torch.bool, device=q.device)
        mask = mask.tril(before) if causal else mask
        mask = mask.triu(before + 1 - window) if window else mask
    if mask is not None and (softcap or blind):
        shared, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        scores = (queries @ keys.repeat_interleave(shared, 1).transpose(2, 3)).to(wide) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights.to(q.dtype) @ values.repeat_interleave(shared, 1))[0].transpose(0, 1)
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _joined(x: Tensor, chain: Sequence[tuple[int, int]]) -> Tensor:
    pieces = [x[start:stop] for start, stop in chain]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int, causal: bool
    ) -> Tensor:
        tokens, heads, _ = q.shape
        out = q.new_empty(q.shape)
        log_sums = q.new_empty((heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.spans, ctx.scale, ctx.window, ctx.causal = spans, scale, window, causal
        failed = product("attention_forward")(
            Heads.of(q), Heads.of(k), Heads.of(v), out.data_ptr(), log_sums.data_ptr(), _layout(ctx, q, k)
        )
        _check(failed, q)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(2) == 1 else grads[0].contiguous()
        grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        failed = product("attention_backward")(
            *(Heads.of(x) for x in (q, k, v)),
            out.data_ptr(),
            log_sums.data_ptr(),
            Heads.of(grad),
            *(x.data_ptr() for x in (grad_q, grad_k, grad_v)),
            _layout(ctx, q, k),
        )
        _check(failed, q)
        return grad_q, grad_k, grad_v, None, None, None, None


def _layout(ctx: Any, q: Tensor, k: Tensor) -> Layout:
    spans = ctx.spans
    sizes = (spans.count, len(q), q.shape[1], k.shape[1], q.shape[2])
    return Layout(spans.c_bounds, spans.c_after, *sizes, ctx.scale, ctx.window, ctx.causal)


def _check(failed: int, q: Tensor) -> None:
    if failed:
        raise MemoryError(f"attention over {len(q)} tokens: no memory for its blocks; use fewer tokens a micro-batch")
