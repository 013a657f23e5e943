"""Attention document by document for any transformers model, through the library's own registry, no code touched.

A model whose attention implementation is `rankwise` hands each layer's q, k, v to `_attend_documents`, which looks at
one document at a time: of a packed stream, or of padded rows.  Where the documents lie is set by `streaming` around
each pass; backward runs inside it too, so that recomputed layers find it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rankwise.kernels.attention import Spans, attend

NAME = "rankwise"


class Rows:
    """Documents in padded rows, each at the beginning of its own.

    Args:
        lengths: tokens of each; None where every row is full, however long the model makes it.
    """

    def __init__(self, lengths: np.ndarray | None) -> None:
        self.lengths = lengths
        self.spans = cache(self._spans)

    def _spans(self, rows: int, width: int) -> Spans:
        """Of `rows` rows of `width` tokens, one behind the other; what fills a row up is a document nobody reads."""
        begins = np.arange(rows + 1) * width
        if self.lengths is None:
            return Spans(tuple(begins.tolist()))
        if len(self.lengths) != rows:
            raise UnpackableError(f"{rows} rows of attention for {len(self.lengths)} documents")
        return Spans(tuple(np.union1d(begins, begins[:-1] + self.lengths).tolist()))


# One stream at a time in a process.  A context variable would not do: on GPUs autograd recomputes in its own threads.
_documents: list[Spans | Rows] = []


class UnpackableError(Exception):
    """A model's attention asks for something that is not done here; it goes by its own."""


@contextmanager
def streaming(documents: Spans | Rows) -> Iterator[None]:
    """Within it, attention layers of models in `packed` attend inside these documents."""
    _documents.append(documents)
    try:
        yield
    finally:
        _documents.pop()


def _attend_documents(
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
    """Transformers' attention function: q, k, v `[rows, heads, T, width]` → `[rows, T, heads, width]`.

    A stream is one row.
    """
    causal = getattr(module, "is_causal", True) if named.get("is_causal") is None else named["is_causal"]
    strange = [name for name in ("s_aux", "position_bias", "head_mask") if named.get(name) is not None]
    strange += ["dropout"] if named.get("dropout") else []
    carried = attention_mask is not None and carries_window(attention_mask)
    strange += ["a window that looks ahead"] if not causal and (sliding_window or carried) else []
    elsewhere = key.shape[2] != query.shape[2]  # what another model has read, as a decoder looks back at its encoder
    if strange or elsewhere or not _documents or not (attention_mask is None or carried):
        raise UnpackableError(f"{type(module).__name__}: {', '.join(strange) or 'not attention of a text to itself'}")
    rows, tokens, where = query.shape[0], query.shape[2], _documents[-1]
    spans = where.spans(rows, tokens) if isinstance(where, Rows) else where
    if spans.bounds[-1] != rows * tokens:
        raise UnpackableError(
            f"{type(module).__name__}: {rows} × {tokens} tokens, expected {spans.bounds[-1]} in one row"
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    windows = [sliding_window] if sliding_window else []
    windows += [int(attention_mask)] if carried else []  # type: ignore[arg-type]  # carried: it is a tensor
    out = attend(q, k, v, spans, scale, min(windows, default=0), softcap or 0.0, causal)
    return out.unflatten(0, (rows, tokens)), None


def window_alone(
    *_: Any, local_size: int | None = None, use_vmap: bool = False, config: Any = None, **__: Any
) -> Tensor | None:
    """In place of a mask: documents are told by where they lie, so that the window is all there is to know.

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


def carries_window(mask: Tensor) -> bool:
    """Masks proper are of truth values or of floats."""
    return isinstance(mask, Tensor) and mask.shape == (1, 1, 1, 1) and mask.dtype == torch.int64


AttentionInterface.register(NAME, _attend_documents)
AttentionMaskInterface.register(NAME, window_alone)


@contextmanager
def attending(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Within it the model attends by an implementation of the registry's; its own is put back after.

    By `rankwise` document by document.

    Raises:
        UnpackableError: the model's attention does not go through transformers' interface.
    """
    own = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        raise UnpackableError(f"{type(model).__name__} does not use transformers' attention interface")
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
