"""Which adapter each piece of a batch uses.

A route names an adapter, one's first directions (`Prefix`), several in a weighted sum (`Mix`), or None for the bare
base, for every unit of a batch, in runs of equal neighbours.  Its unit is a row of the batch (`rows`), a token of a
packed stream (`tokens`), or everything at once (`whole`).
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from operator import mul
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.adapters.scaling import Scaling
from rankwise.errors import RankwiseWarning, RouteError, listing

Unit = Literal["whole", "rows", "tokens"]

_NO_ROUTE = (
    "a training pass through a model that holds adapters, with no route set: the bare base answers and no adapter "
    "learns; train within `with bank.use(name):`, or say bank.use(None) where the base is meant"
)


@dataclass(frozen=True)
class Mix:
    """Adapters in a weighted sum: y = base(x) + Σ weight · ΔW·x, with any weights, negative ones and 0 too.

    It stands in a route where a name may stand.  What it sums is of low rank: form `dora`, modules trained whole and
    rows of tokens are no terms of a sum.
    """

    weights: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Mix:
        """By name.

        Raises:
            RouteError: there are none, or one is no finite number.
        """
        found = tuple((name, float(weight)) for name, weight in weights.items())
        if not found or not all(math.isfinite(weight) for _, weight in found):
            raise RouteError(f"a mix of {dict(weights)!r}", hint='give finite weights by name: {"a": 0.7, "b": 0.3}')
        return cls(found)

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} · {name}" for name, weight in self.weights)


@dataclass(frozen=True)
class Prefix:
    """The first directions of an adapter: y = base(x) + s(rank)·B[:, :rank]·A[:rank]·x, and `scaling` says what s is.

    It stands in a route where a name may stand.  Modules trained whole and rows of tokens come with it as they are.
    """

    name: str
    rank: int
    scaling: Scaling

    def __str__(self) -> str:
        return f"{self.name} at rank {self.rank}"


Way = str | Prefix | Mix | None  # what a unit of a route takes


def members_of(way: Way) -> tuple[str, ...]:
    """The adapters that a way leads through."""
    if isinstance(way, Mix):
        return tuple(name for name, _ in way.weights)
    if isinstance(way, Prefix):
        return (way.name,)
    return () if way is None else (way,)


def check_mixes(route: Route, members: Mapping[str, Any]) -> None:
    """That what is mixed can be summed; `members` as the bank remembers them.

    Raises:
        RouteError: lists what cannot.
    """
    problems = []
    for name in sorted({name for way in route.names if isinstance(way, Mix) for name in members_of(way)}):
        if members[name].spec.form == "dora":
            problems.append(f"{name} is of form dora: what it makes of W is no sum of W and a change")
        if members[name].modules or members[name].tokens:
            problems.append(f"{name} has modules trained whole or rows of tokens, which only one adapter can bring")
    if problems:
        raise RouteError(
            f"these adapters cannot be mixed:\n{listing(problems)}", hint="use them one by one: bank.use(name)"
        )


@dataclass(frozen=True)
class Route:
    """Runs of `(adapter, units)` in order; `whole` has one run of one unit."""

    unit: Unit
    runs: tuple[tuple[Way, int], ...]

    @classmethod
    def whole(cls, name: Way) -> Route:
        return cls("whole", ((name, 1),))

    @classmethod
    def rows(cls, names: Iterable[Way]) -> Route:
        return cls("rows", tuple((name, len(list(group))) for name, group in groupby(names)))

    @classmethod
    def tokens(cls, runs: Iterable[tuple[Way, int]]) -> Route:
        groups = groupby(runs, key=lambda run: run[0])
        return cls("tokens", tuple((name, sum(count for _, count in group)) for name, group in groups))

    @property
    def names(self) -> set[Way]:
        return {name for name, _ in self.runs}

    @property
    def members(self) -> set[str]:
        """Every adapter that takes part, alone or mixed."""
        return {name for way in self.names for name in members_of(way)}

    @property
    def units(self) -> int:
        return sum(count for _, count in self.runs)

    def spans(self, shape: torch.Size, width_dims: int, where: str) -> Iterator[tuple[Way, int, int]]:
        """`(adapter, start, stop)` over the rows of an input of `shape` once its leading dimensions are flattened.

        `width_dims` is how many trailing dimensions belong to one row (1 for linear layers, 0 for embeddings).

        Raises:
            RouteError: the input is not laid out row by row or token by token as the route says.
        """
        leading = shape[: len(shape) - width_dims]
        rows = torch.Size(leading).numel()
        if self.unit == "whole" or (len(leading) == 1 and len(self.runs) == 1):
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
        if len(self.runs) == 1:
            yield self.runs[0][0], 0, rows
            return
        start = 0
        for name, count in self.runs:
            yield name, start, start + count * each
            start += count * each


class Router:
    """The route in force, shared by every adapted layer of a bank, and the tick that dropout masks are drawn from.

    While adapters are held it watches the modules above their layers (`watch`), for two reasons.  A layer whose input
    is flattened can tell from what the modules around it were given whether that still is row by row.  And a call of
    the model is a forward pass, which a route without a tick of its own counts.

    The recomputation of a checkpointed block does not call the model, so it meets the tick of its own pass as long as
    the backward pass comes before the next forward pass.  Two forward passes and then two backward passes under one
    route, with checkpointing and dropout, need a given tick.

    `compiled` is set while the engine holds the model: linear layers then take the compiled product where there is one,
    with or without an adapter, whose last bits are not those of torch's.
    """

    def __init__(self) -> None:
        self.route = Route.whole(None)
        self.merged: str | None = None
        self.compiled = False
        self.tick = 0
        self._given = False
        self._set = 0  # how many routes are in force, one inside the other
        self._shapes: dict[str, list[torch.Size]] = {}  # of the tensors each watched module was last called with
        self._hooks: dict[str, Any] = {}
        self._nesting: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        """A copy, of a bank or of a model alone, is in no route: whoever set one will end it for the original only."""
        memo[id(self)] = twin = Router()
        twin.__dict__ |= {name: copy.deepcopy(getattr(self, name), memo) for name in ("merged", "_hooks", "_nesting")}
        return twin

    # ── watching ─────────────────────────────────────────────────────────────────────────────────────────────────

    def watch(self, model: Any, path: str) -> None:
        """Watches the modules above a layer.

        A hook on TransformerEncoderLayer also keeps it off its fast path, which reads the weights of its layers and
        never calls them; TransformerEncoder's nested tensors need that fast path, so they are put off too.
        """
        for above in _above(path):
            if above not in self._hooks:
                module = model.get_submodule(above)
                called = partial(self._called, above)
                self._hooks[above] = module.register_forward_pre_hook(called, with_kwargs=True)
                if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
                    module.use_nested_tensor = False
                    self._nesting.append(module)

    def unwatch(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        for module in self._nesting:
            module.use_nested_tensor = True
        self._hooks, self._nesting, self._shapes = {}, [], {}

    def _called(self, path: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not path:
            self.tick += not self._given
            if not self._set and module.training and torch.is_grad_enabled():
                warnings.warn(_NO_ROUTE, RankwiseWarning, stacklevel=2)
        if self.route.unit != "whole":
            self._shapes[path] = [tensor.shape for tensor in _tensors((*inputs, *named.values())) if tensor.dim()]

    def spans(self, shape: torch.Size, width_dims: int, where: str) -> Iterator[tuple[Way, int, int]]:
        """`Route.spans` of the route in force, for a layer of the model.

        Raises:
            RouteError: also where a flattened input may hold other tokens, or in another order, than the batch.
        """
        leading = shape[: len(shape) - width_dims]
        if len(leading) == 1 and len(self.route.runs) > 1 and not self._is_in_order(where, leading[0]):
            raise RouteError(
                f"{where}: no telling which {self.route.unit} an input of shape {tuple(shape)} belongs to",
                hint="route one adapter for the whole batch with bank.use(name), or run the adapters one by one",
            )
        return self.route.spans(shape, width_dims, where)

    def _is_in_order(self, where: str, rows: int) -> bool:
        """Whether a flat input is the whole batch, in order: every module above was given a batch of these units.

        Experts are not trusted at all: one that is sent every token may be sent them in another order.
        """
        units = self.route.units
        if re.search("expert", where, re.I):
            return False
        known = [shapes for above in _above(where) if (shapes := self._shapes.get(above))]
        if self.route.unit == "tokens":
            fits = [[s for s in shapes if s[0] == units or s[:2] == (1, units)] for shapes in known]
        else:
            fits = [[s for s in shapes if s[0] == units] for shapes in known]
        if not fits:
            return rows == units
        return all(fits) and any(rows in accumulate(shape, mul) for shape in fits[-1])

    @contextmanager
    def set(self, route: Route, tick: int | None = None) -> Iterator[None]:
        """Puts a route in force for a while.

        `tick` numbers its forward passes, all alike, those of routes inside it that have none too.  None counts on:
        at once, and at every call of the model.
        """
        if self.merged is not None and route.names != {self.merged}:
            raise RouteError(
                f"adapter {self.merged!r} is merged into the base, so nothing else can be routed",
                hint="bank.unmerge() first",
            )
        before = self.route, self.tick, self._given, self._shapes
        self.route, self._shapes = route, {}
        if tick is not None:
            self.tick, self._given = tick, True
        elif not self._given:
            self.tick += 1
        self._set += 1
        try:
            yield
        finally:
            self._set -= 1
            counted = self.tick
            self.route, self.tick, self._given, self._shapes = before
            if not self._given and tick is None:
                self.tick = counted


def _above(path: str) -> list[str]:
    """The paths of the modules above a layer, the model's own ("") first."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among a call's arguments, those in tuples, lists and dictionaries too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(list(value.values()))
