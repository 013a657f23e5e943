"""Which adapter each piece of a batch uses.

A route names an adapter, or None for the bare base, for every unit of a batch, in runs of equal neighbours.  Its unit
is a row of the batch (`rows`), a token of a packed stream (`tokens`), or everything at once (`whole`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch

from rankwise.errors import RouteError

Unit = Literal["whole", "rows", "tokens"]


@dataclass(frozen=True)
class Route:
    """Runs of `(adapter, units)` in order; `whole` has one run of one unit."""

    unit: Unit
    runs: tuple[tuple[str | None, int], ...]

    @classmethod
    def whole(cls, name: str | None) -> Route:
        return cls("whole", ((name, 1),))

    @classmethod
    def rows(cls, names: Iterable[str | None]) -> Route:
        return cls("rows", tuple((name, len(list(group))) for name, group in groupby(names)))

    @classmethod
    def tokens(cls, runs: Iterable[tuple[str | None, int]]) -> Route:
        groups = groupby(runs, key=lambda run: run[0])
        return cls("tokens", tuple((name, sum(count for _, count in group)) for name, group in groups))

    @property
    def names(self) -> set[str | None]:
        return {name for name, _ in self.runs}

    @property
    def units(self) -> int:
        return sum(count for _, count in self.runs)

    def spans(self, shape: torch.Size, width_dims: int, where: str) -> Iterator[tuple[str | None, int, int]]:
        """`(adapter, start, stop)` over the rows of an input of `shape` once its leading dimensions are flattened.

        `width_dims` is how many trailing dimensions belong to one row (1 for linear layers, 0 for embeddings).

        Raises:
            RouteError: the input is not laid out row by row or token by token as the route says.
        """
        leading = shape[: len(shape) - width_dims]
        rows = torch.Size(leading).numel()
        if self.unit == "whole":
            each = rows
        elif self.unit == "tokens":
            each = 1 if rows == self.units else 0
        else:  # a flattened [rows × tokens, width] input, as OPT makes, keeps each row's tokens together
            fits = leading[:1] == (self.units,) or (len(leading) == 1 and rows % self.units == 0)
            each = rows // self.units if fits else 0
        if not each:
            raise RouteError(
                f"{where}: input of shape {tuple(shape)} does not divide into the route's {self.units} {self.unit}",
                hint="route one adapter for the whole batch with bank.use(name), or run the adapters one by one",
            )
        start = 0
        for name, count in self.runs:
            yield name, start, start + count * each
            start += count * each


class Router:
    """The route in force, shared by every adapted layer of a bank, and the tick that dropout masks are drawn from."""

    def __init__(self) -> None:
        self.route = Route.whole(None)
        self.merged: str | None = None
        self.tick = 0

    @contextmanager
    def set(self, route: Route, tick: int | None = None) -> Iterator[None]:
        """Puts a route in force for a while.  `tick` numbers the forward pass; None counts on."""
        if self.merged is not None and route.names != {self.merged}:
            raise RouteError(
                f"adapter {self.merged!r} is merged into the base, so nothing else can be routed",
                hint="bank.unmerge() first",
            )
        before = self.route, self.tick
        self.route, self.tick = route, self.tick + 1 if tick is None else tick
        try:
            yield
        finally:
            self.route = before[0]
            self.tick = before[1] if tick is not None else self.tick
