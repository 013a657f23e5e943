"""All layers of a plain decoder in one compiled call, for the few rows of a step of serving.

    h += o(attention(turned(q(n)), turned(k(n)), v(n)))    n = rms_norm(h)
    h += down(act(gate(n)) ∘ up(n))                        n = rms_norm(h)

Llama's form (arXiv:2302.13971, §2.2) with biases, or norms on the heads of q and k (Qwen3), where there are any.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.kernels.cached import Look, Pieces
from rankwise.kernels.grouped import Adapters, Grouped
from rankwise.kernels.library import DecoderOf, LayerOf, native

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Layer:
    """One layer: weights of its norms `[hidden]`, those of its heads `[D]` or None, and its seven products."""

    norm1: Tensor
    norm2: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    linears: Sequence[Grouped]  # as LINEARS
    look: Look


@dataclass(frozen=True)
class Shape:
    """What is the same in all layers; `activation` as in `kernels/gate.py`, `offset` as in `kernels/norm.py`."""

    heads: int
    groups: int
    width: int
    activation: int
    eps: float
    offset: float


class Decoder:
    """A decoder's layers, told to the C side once.

    Args:
        caches: keys and values `[S, G, D]` of each layer.
    """

    def __init__(self, layers: Sequence[Layer], shape: Shape, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._held = layers, caches
        self.shape, self.look = shape, layers[0].look
        told = (LayerOf * len(layers))()
        for one, layer, (keys, values) in zip(told, layers, caches, strict=True):
            norms = (layer.norm1, layer.norm2, layer.q_norm, layer.k_norm)
            one.norm1, one.norm2, one.q_norm, one.k_norm = (None if x is None else x.data_ptr() for x in norms)
            for name, linear in zip(LINEARS, layer.linears, strict=True):
                setattr(one, name, linear.told)
            one.keys, one.values, one.window = keys.data_ptr(), values.data_ptr(), layer.look.window
        hidden = layers[0].norm1.shape[0]
        self._told = DecoderOf(told, len(layers), hidden, shape.activation, shape.eps, shape.offset)

    def __call__(self, h: Tensor, cosines: Tensor, sines: Tensor, pieces: Pieces, adapters: Adapters) -> Tensor:
        """What comes out of the last layer, `[N, hidden]`; h `[N, hidden]`, cosines and sines `[N, D]`."""
        out = h.clone(memory_format=torch.contiguous_format)
        turns = cosines.contiguous(), sines.contiguous()
        past = pieces.past(self.look, self.shape.heads, self.shape.groups, self.shape.width)
        failed = native().decoder_step(  # type: ignore[union-attr]
            ctypes.byref(self._told),
            ctypes.byref(past),
            adapters.told,
            len(out),
            *(x.data_ptr() for x in (out, *turns)),
            h.dtype == torch.float32,
        )
        if failed:
            raise torch.OutOfMemoryError(f"no memory for a step of {len(out)} tokens")
        return out
