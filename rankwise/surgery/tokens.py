"""Embeddings and heads in which adapters have rows of their own (`adapters/tokens.py`).

Where a token lies behind the base's last row, the base has one for it too for as long as any adapter does: the mean of
its own.  No matrix is copied for that; what lies behind is kept beside.

Shape letters: N rows of input, V the base's own rows, T rows behind them, K an adapter's rows and those behind it has
not, H features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.adapters.tokens import TokenRows
from rankwise.surgery.layer import Stand, key_of
from rankwise.surgery.routing import Route, Router, Way, members_of
from rankwise.surgery.sites import Site


@dataclass(frozen=True)
class Words:
    """Rows that stand in for the base's: `rows` `[K, H]` in its number format, of the tokens `ids` `[K]`, ascending.

    The first `inside` replace rows of the base; the others lie behind its last, without a gap.
    """

    ids: Tensor
    rows: Tensor
    inside: int

    @property
    def split(self) -> tuple[Tensor, Tensor]:
        """Rows that replace, and rows behind."""
        return self.rows[: self.inside], self.rows[self.inside :]

    @torch.no_grad()
    def onto(self, weight: Tensor) -> Tensor:
        """The base's weight `[V, H]` with these rows in place, `[V + T, H]`; a new tensor."""
        inside, behind = self.split
        whole = torch.cat([weight.detach(), behind.to(weight)])
        whole[self.ids[: self.inside]] = inside.to(weight)
        return whole


class TokenLayer(Stand):
    """What embeddings and heads have in common.

    Args:
        middle: `[H]`, the mean of the base's rows.
    """

    counts: str  # the base's name for how many rows it has
    middle: Tensor
    behind: Tensor

    def __init__(self, site: Site, router: Router, middle: Tensor) -> None:
        super().__init__(site.path, site.module, router)
        weight: Tensor = self.base.weight
        self.known = len(weight)
        self.register_buffer("middle", middle.to(weight), persistent=False)
        self.register_buffer("behind", weight.new_empty(0, weight.shape[1]), persistent=False)
        self._inside: dict[str, int] = {}  # how many of an adapter's rows replace the base's own

    def admit(self, name: str, own: TokenRows, seed: int) -> None:
        self.adapters[key_of(name)] = own.to(self.base.weight.device)
        self._inside[name] = int((own.ids < self.known).sum())

    @property
    def needed(self) -> int:
        """Tokens there must be rows for."""
        return self.known + max((len(self.of(name).ids) - inside for name, inside in self._inside.items()), default=0)

    def dismiss(self, name: str) -> None:
        super().dismiss(name)
        self._inside.pop(name, None)

    def dismiss_but(self, name: str) -> None:
        for other in [other for other in self._inside if other != name]:
            self.dismiss(other)

    def reach(self, size: int) -> None:
        """Has a row for each of so many tokens, the base's own and those behind."""
        self.behind = self.middle.repeat(size - self.known, 1)

    def words(self, name: Way) -> Words | None:
        """What stands in for the base's rows where `name` is used; None where nothing does."""
        table: TokenRows | None = self.of(name)
        if table is None:
            ids = torch.arange(self.known, self.known + len(self.behind), device=self.behind.device)
            return Words(ids, self.behind, 0) if len(ids) else None
        inside = self._inside[members_of(name)[0]]
        own = len(table.ids) - inside  # of those behind
        rest = torch.arange(own, len(self.behind), device=table.ids.device) + self.known
        rows = torch.cat([table.rows.to(self.behind.dtype), self.behind[own:]])
        return Words(torch.cat([table.ids, rest]), rows, inside)

    def _spans(self, shape: torch.Size, width_dims: int) -> Iterator[tuple[Words | None, slice]]:
        """The rows of a flattened input, by what stands in for the base's."""
        if self.router.merged is not None:
            rows = shape[: len(shape) - width_dims].numel()
            yield self.words(self.router.merged), slice(0, rows)
            return
        for name, start, stop in self.router.spans(shape, width_dims, self.path):
            yield self.words(name), slice(start, stop)

    def _is_plain(self) -> bool:
        route = self.router.route if self.router.merged is None else Route.whole(self.router.merged)
        return not len(self.behind) and all(self.of(name) is None for name in route.names)


class TokenEmbedding(TokenLayer):
    counts = "num_embeddings"

    def forward(self, x: Tensor) -> Tensor:
        if self._is_plain():
            return self.base(x)
        y = self.base(x.clamp(max=self.known - 1) if len(self.behind) else x)
        flat_x, flat_y = x.reshape(-1), y.reshape(-1, y.shape[-1])
        pieces = [
            flat_y[rows] if words is None else self._replaced(flat_x[rows], flat_y[rows], words)
            for words, rows in self._spans(x.shape, 0)
        ]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(y.shape)

    def _replaced(self, x: Tensor, y: Tensor, words: Words) -> Tensor:
        """`y` `[N, H]` with the rows of those tokens `x` `[N]` that have one; a token behind all rows is an error."""
        place = torch.searchsorted(words.ids, x)
        if not len(self.behind):  # a token that is greater than all of these is one of the base's
            place = place.clamp(max=len(words.ids) - 1)
        hit = words.ids[place] == x
        scale: Any = getattr(self.base, "embed_scale", 1.0)  # Gemma's embedding multiplies what it looked up
        own = F.embedding(place, words.rows) * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(hit.unsqueeze(1), own, y)


class TokenHead(TokenLayer):
    counts = "out_features"

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self._is_plain():
            return y
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        pieces = [
            flat_y[rows] if words is None else self._replaced(flat_x[rows], flat_y[rows], words)
            for words, rows in self._spans(x.shape, 1)
        ]
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return out.view(*y.shape[:-1], out.shape[-1])

    @staticmethod
    def _replaced(x: Tensor, y: Tensor, words: Words) -> Tensor:
        """`[N, V + T]` from hidden states `x` `[N, H]` and the base's logits `y` `[N, V]`."""
        inside, behind = words.split
        if len(inside):
            y = y.index_copy(1, words.ids[: words.inside], F.linear(x, inside))
        return torch.cat([y, F.linear(x, behind)], dim=1) if len(behind) else y
