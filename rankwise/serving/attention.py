"""Attention of a serving step, through transformers' registry, as `engine/attention.py` does for a packed stream.

A model whose attention implementation is `rankwise-serving` hands each layer's q, k, v to `_attend_cached`.  Layers are
told apart by the order in which a pass comes to them, so nothing has to be known of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from rankwise.engine.attention import UnpackableError, carries_window, window_alone
from rankwise.kernels.cached import Look, Pieces, attend_cached

NAME = "rankwise-serving"


@dataclass(frozen=True)
class Facts:
    """What a pass found out about a layer: query heads, key-value heads and their width, if they have one, and how."""

    heads: tuple[int, int, int] | None
    look: Look


class Store:
    """Keys and values of every layer, `[slots, heads, width]` each; a layer's room is made when a pass comes to it.

    Attributes:
        layers: keys and values, in the order of a pass.
        facts: of each layer.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.facts: list[Facts] = []
        self._next = 0
        self._pieces: Pieces | None = None

    @property
    def bytes_per_slot(self) -> int:
        """Of all layers a pass has come to."""
        return sum(x[0].nbytes for layer in self.layers for x in layer)

    def grown(self, slots: int) -> Store:
        """One of the same layers with other room, nothing in it."""
        other = Store(slots)
        other.layers = [tuple(x.new_empty(slots, *x.shape[1:]) for x in layer) for layer in self.layers]  # type: ignore[misc]
        other.facts = self.facts
        return other

    @contextmanager
    def step(self, pieces: Pieces) -> Iterator[None]:
        """One pass over the tokens of these pieces.

        Raises:
            UnpackableError: the pass came to fewer layers than one before.
        """
        self._pieces, self._next = pieces, 0
        _stores.append(self)
        try:
            yield
        finally:
            _stores.pop()
            self._pieces = None
        if self._next != len(self.layers):
            raise UnpackableError(f"a pass through {self._next} layers of attention after one through more")

    @property
    def pieces(self) -> Pieces:
        """Of the pass that runs."""
        assert self._pieces is not None
        return self._pieces

    def passed(self) -> Pieces:
        """As `pieces`, for who goes through all layers at once."""
        self._next = len(self.layers)
        return self.pieces

    def attend(self, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        """Of the next layer: q `[N, H, D]`, k, v `[N, G, D]`."""
        if self._next == len(self.layers):
            self.layers.append(tuple(x.new_empty(self.slots, *x.shape[1:]) for x in (k, v)))  # type: ignore[arg-type]
            same = k.shape == v.shape and q.shape[2] == k.shape[2]
            self.facts.append(Facts((q.shape[1], k.shape[1], k.shape[2]) if same else None, look))
        keys, values = self.layers[self._next]
        self._next += 1
        return attend_cached(q, k, v, keys, values, self.pieces, look)


_stores: list[Store] = []  # of the pass that runs


def _attend_cached(
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
    strange += [] if causal else ["a look ahead"]
    carried = attention_mask is not None and carries_window(attention_mask)
    strange += ["a mask of its own"] if attention_mask is not None and not carried else []
    if strange or not _stores or key.shape[2] != query.shape[2] or query.shape[0] != 1:
        raise UnpackableError(f"{type(module).__name__}: {', '.join(strange) or 'not attention of a text to itself'}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    windows = [sliding_window] if sliding_window else []
    windows += [int(attention_mask)] if carried else []  # type: ignore[arg-type]  # carried: it is a tensor
    out = _stores[-1].attend(q, k, v, Look(scale, min(windows, default=0), softcap or 0.0))
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, _attend_cached)
AttentionMaskInterface.register(NAME, window_alone)
