"""Attention through a cache: tokens of many requests, each to all that its own request has had so far.

Shape letters: N tokens of a step, H query heads, G key-value heads (G divides H), D width of a head, S slots of the
cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.kernels.attention import Spans, attend
from rankwise.kernels.grouped import serves_grouped
from rankwise.kernels.library import Heads, Past, native
from rankwise.kernels.sizes import LANES

_FEW = 16  # tokens of a piece up to which each goes over its past alone


@dataclass(frozen=True)
class Look:
    """How a layer's heads look at the past.

    Attributes:
        scale: factor of the scores.
        window: how many tokens a token sees, itself included; 0 for all.
        softcap: scores x become softcap · tanh(x / softcap); 0 for none.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True)
class Piece:
    """Tokens `start` up to `stop` of a step belong to one request, and are the last of the `seen` it has had.

    Its token i lies in slot `blocks[i // block] · block + i % block`.
    """

    start: int
    stop: int
    seen: int
    blocks: Sequence[int]

    @property
    def own(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Pieces:
    """Where the tokens of a step, in pieces one behind the other, belong.

    Args:
        block: slots of a block.
    """

    pieces: Sequence[Piece]
    block: int
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.pieces[-1].stop

    @cached_property
    def slots(self) -> Tensor:
        """Of the step's own tokens, `[N]`."""
        return torch.cat([self.read(piece)[piece.seen - piece.own :] for piece in self.pieces])

    @cached_property
    def _read(self) -> dict[int, Tensor]:
        return {}

    def read(self, piece: Piece) -> Tensor:
        """Where all that a piece sees lies, `[seen]`."""
        known = self._read.get(piece.start)
        if known is None:
            blocks = torch.tensor(piece.blocks, device=self.device)
            each = torch.arange(self.block, device=self.device)
            known = self._read[piece.start] = (blocks.unsqueeze(1) * self.block + each).flatten()[: piece.seen]
        return known

    @cached_property
    def _told(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen = np.concatenate([np.arange(one.seen - one.own, one.seen) + 1 for one in self.pieces])
        begins = np.cumsum([0, *(len(one.blocks) for one in self.pieces[:-1])])
        each = np.repeat(begins, [one.own for one in self.pieces])
        tables = np.concatenate([np.asarray(one.blocks, dtype=np.int32) for one in self.pieces])
        return seen.astype(np.int64), each.astype(np.int64), tables

    def past(self, look: Look, heads: int, groups: int, width: int) -> Past:
        """As the C side sees it; good as long as this lives."""
        places = (array.ctypes.data for array in self._told)
        return Past(*places, self.block, heads, groups, width, look.window, look.scale, look.softcap)

    @cached_property
    def runs(self) -> list[tuple[str, list[Piece]]]:
        """Neighbours that attend in one way: `few` tokens of a long past, `fresh` without a past, `more` of both."""

        def way(piece: Piece) -> str:
            if piece.own <= _FEW:
                return "few"
            return "fresh" if piece.own == piece.seen else "more"

        return [(name, list(group)) for name, group in groupby(self.pieces, way)]


def attend_cached(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pieces: Pieces, look: Look) -> Tensor:
    """Keeps the keys and values of a step's tokens, then attends, causally.

    Args:
        q: `[N, H, D]`; k, v: `[N, G, D]`, of their own width each.
        keys, values: the cache `[S, G, D]`, written in place.

    Returns:
        `[N, H, D]`.
    """
    if _serves(q, k, v, keys, values, pieces):
        return _compiled(q, k, v, keys, values, pieces, look)
    keys.index_copy_(0, pieces.slots, k)
    values.index_copy_(0, pieces.slots, v)
    found = [_attend(q[one.start : one.stop], keys, values, pieces.read(one), look) for one in pieces.pieces]
    return found[0] if len(found) == 1 else torch.cat(found)


def _serves(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pieces: Pieces) -> bool:
    same = k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0
    close = all(x.stride(2) == 1 for x in (q, k, v)) and keys.is_contiguous() and values.is_contiguous()
    return same and close and pieces.block % LANES == 0 and serves_grouped(q, k, v, keys, values)


def _compiled(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pieces: Pieces, look: Look) -> Tensor:
    out = q.new_empty(q.shape)
    past = pieces.past(look, q.shape[1], k.shape[1], q.shape[2])

    def attending(kept: int, first: int, last: int) -> None:
        failed = native().cached_attention(  # type: ignore[union-attr]
            ctypes.byref(past),
            *(Heads.of(x) for x in (q, k, v)),
            *(x.data_ptr() for x in (keys, values, out)),
            *(kept, first, last),
            q.dtype == torch.float32,
        )
        if failed:
            raise torch.OutOfMemoryError(f"no memory for attention over {int(pieces._told[0].max())} tokens")

    runs = pieces.runs
    for i, (way, group) in enumerate(runs):
        start, stop = group[0].start, group[-1].stop
        few = way == "few"
        if few or not i:  # whatever comes first has all keys and values kept
            attending(0 if i else pieces.tokens, start, stop if few else start)
        if way == "fresh":
            spans = Spans((0, *(one.stop - start for one in group)))
            fresh_q, fresh_k, fresh_v = (x[start:stop] for x in (q, k, v))
            out[start:stop] = attend(fresh_q, fresh_k, fresh_v, spans, look.scale, look.window, look.softcap)
        elif not few:
            for one in group:
                out[one.start : one.stop] = _attend(q[one.start : one.stop], keys, values, pieces.read(one), look)
    return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, read: Tensor, look: Look) -> Tensor:
    """One piece to all that it sees."""
    own, seen = len(q), len(read)
    queries = q.transpose(0, 1).unsqueeze(0)
    k, v = (x[read].transpose(0, 1).unsqueeze(0) for x in (keys, values))
    mask = None
    if own > 1 or 0 < look.window < seen:
        mask = torch.ones(own, seen, dtype=torch.bool, device=q.device).tril(seen - own)
        mask = mask.triu(seen - own + 1 - look.window) if look.window else mask
    if look.softcap:
        shared, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        scores = (queries @ k.repeat_interleave(shared, 1).transpose(2, 3)).to(wide) * look.scale
        scores = look.softcap * torch.tanh(scores / look.softcap)
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        out = scores.softmax(-1).to(q.dtype) @ v.repeat_interleave(shared, 1)
        return out[0].transpose(0, 1)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=look.scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)
