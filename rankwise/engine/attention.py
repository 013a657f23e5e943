"""Packed attention for any transformers model, through the library's own registry: no model's code is touched.

A model whose attention implementation is `rankwise` hands each layer's q, k, v of the whole stream to `_attend_stream`,
which looks at one document at a time.  Where the documents lie is set by `streaming` around each pass; backward runs
inside it too, so that recomputed layers find it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rankwise.kernels.attention import Spans, attend

NAME = "rankwise"

# One stream at a time in a process.  A context variable would not do: on GPUs autograd recomputes in its own threads.
_spans: list[Spans] = []


class UnpackableError(Exception):
    """A model's attention asks for something that packed attention does not do; its documents go row by row."""


@contextmanager
def streaming(spans: Spans) -> Iterator[None]:
    """Within it, attention layers of packed models attend inside these documents."""
    _spans.append(spans)
    try:
        yield
    finally:
        _spans.pop()


def _attend_stream(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: q, k, v `[1, heads, N, width]` → `[1, N, heads, width]`."""
    causal = getattr(module, "is_causal", True) if named.get("is_causal") is None else named["is_causal"]
    strange = [name for name in ("s_aux", "position_bias", "head_mask") if named.get(name) is not None]
    strange += ["dropout"] if named.get("dropout") else []
    carried = attention_mask is not None and _carries_window(attention_mask)
    if not causal or strange or query.shape[0] != 1 or not _spans or not (attention_mask is None or carried):
        raise UnpackableError(f"{type(module).__name__}: {', '.join(strange) or 'not plain causal attention'}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    windows = [sliding_window] if sliding_window else []
    windows += [int(attention_mask)] if carried else []  # type: ignore[arg-type]  # carried: it is a tensor
    return attend(q, k, v, _spans[-1], scale, min(windows, default=0), softcap or 0.0).unsqueeze(0), None


def _window_alone(
    *_: Any, local_size: int | None = None, use_vmap: bool = False, config: Any = None, **__: Any
) -> Tensor | None:
    """In place of a mask: packed attention never looks across a border, so that the window is all it has to know.

    Some models (Qwen2-MoE, PhiMoE) put their window in the mask and never name it to the attention function.  It
    travels where the mask would: one whole number, in the shape of a mask.
    """
    if use_vmap:  # set by transformers where a model adds to the causal mask or takes from it
        raise UnpackableError("the model's attention has a mask of its own")
    if not local_size:
        return None
    if local_size == getattr(config, "attention_chunk_size", None):
        raise UnpackableError(f"the model attends in chunks of {local_size} tokens")
    return torch.full((1, 1, 1, 1), local_size)


def _carries_window(mask: Tensor) -> bool:
    """Masks proper are of truth values or of floats."""
    return isinstance(mask, Tensor) and mask.shape == (1, 1, 1, 1) and mask.dtype == torch.int64


AttentionInterface.register(NAME, _attend_stream)
AttentionMaskInterface.register(NAME, _window_alone)


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model attends packed streams; its own implementation is put back after.

    Raises:
        UnpackableError: the model's attention does not go through transformers' interface.
    """
    own = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        raise UnpackableError(f"{type(model).__name__} does not use transformers' attention interface")
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
