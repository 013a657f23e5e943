"""Rows of an embedding or a head that an adapter has for itself: those of new tokens, and of old ones it trains.

A row stands in place of the base's row for the same token, or behind the base's last one.  It is no difference: a new
token has nothing to differ from, and the base of another day may have been enlarged with other numbers there.

Shape letters: N tokens, H features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TokenRows(nn.Module):
    """Float32 masters `[N, H]` of the tokens `ids` `[N]`; kept in ascending order of the tokens, whatever was given."""

    ids: Tensor

    def __init__(self, ids: Sequence[int] | Tensor, rows: Tensor) -> None:
        super().__init__()
        order = torch.argsort(torch.as_tensor(ids, dtype=torch.int64))
        self.register_buffer("ids", torch.as_tensor(ids, dtype=torch.int64)[order].to(rows.device))
        self.rows = nn.Parameter(rows.detach()[order.to(rows.device)].float())

    @property
    def tokens(self) -> list[int]:
        return [int(token) for token in self.ids.tolist()]

    @property
    def width(self) -> int:
        """H."""
        return self.rows.shape[1]
