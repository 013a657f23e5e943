"""The adapters of a bank laid out for serving: at every layer the factors of all of them, in the base's number format.

While the engine holds a model, a stand-in takes the place of each adapted linear layer and takes every row of a step
through the factors of its own adapter, by number.  What the rack does not serve (embeddings, convolutions, modules
trained whole, experts) stays as the bank has it and follows the route.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.lowrank import LowRank
from rankwise.kernels.grouped import Adapters, Grouped, Low, laid_out, serves_grouped
from rankwise.surgery.bank import Bank
from rankwise.surgery.kinds import LinearKind
from rankwise.surgery.layer import AdaptedLayer, key_of

_FEW = 64  # rows up to which one call makes the base's product and what is added to it
_ROOM = 8  # adapters for which there is room at first
_version = attrgetter("_version")  # counts up when a tensor is written to


class Rack:
    """Of a bank; `refresh` after every change of it.

    Attributes:
        adapters: of the step that runs.
        room: adapters that a layer's product has room for.
        turn: another number once a layer's product is another one, and not only what adapters add to it; who holds
            products looks for new ones then.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.adapters = Adapters.of([])
        self.turn = 0
        self._laid: dict[str, _Laid] = {}
        self._layers: dict[str, _Shelf] = {}
        self._standing: dict[str, nn.Module] = {}
        self.room = _ROOM
        self._up = False

    def number(self, name: str | None) -> int:
        return -1 if name is None or self.bank.router.merged is not None else self._laid[name].number

    @property
    def nbytes(self) -> int:
        """Of the factors that are laid out."""
        return sum(low.nbytes for shelf in self._layers.values() for low in shelf.grouped.lows.values())

    def refresh(self, *, members_only: bool = False) -> None:
        """Takes in what the bank holds now: lays out who is new or has changed, and lets go of who is not there.

        With `members_only` nobody who stays has changed, and none of their numbers is looked at.
        Where layers stand and whether they can be served is looked at again only where a layer's first adapter has
        come or its last one gone.
        """
        for name, laid in list(self._laid.items()):
            if name not in self.bank or laid.has_gone() or not (members_only or laid.is_as_it_was()):
                self._put_away(name)
        if self._standing != self.bank.stands:
            self._look()
        for shelf in self._layers.values():
            if shelf.has_changed():
                shelf.renew()
                self.turn += 1
        for name in self.bank.names:
            if name not in self._laid:
                self._lay_out(name)

    def _look(self) -> None:
        self._standing = dict(self.bank.stands)
        layers = {}
        for path, holders, stand in self._stands():
            shelf = self._layers.get(path)
            layers[path] = _Shelf(stand, self, holders) if shelf is None or shelf.stand is not stand else shelf
        self._layers = layers
        self.turn += 1

    def _stands(self) -> Iterator[tuple[str, list[tuple[nn.Module, str]], AdaptedLayer]]:
        """The layers that are served, and where each stands in the model."""
        for path, stand in self._standing.items():
            served = isinstance(stand, AdaptedLayer) and isinstance(stand.kind, LinearKind)
            if served and "expert" not in path.lower() and not _is_hooked(stand.base):
                places = (place.rpartition(".") for place in (path, *self.bank.sites[path].aliases))
                yield path, [(self.bank.model.get_submodule(parent), leaf) for parent, _, leaf in places], stand  # type: ignore[misc]

    def _lay_out(self, name: str) -> None:
        taken = {laid.number for laid in self._laid.values()}
        number = next(i for i in range(len(taken) + 1) if i not in taken)
        if number >= self.room:
            self.room *= 2
            for shelf in self._layers.values():
                shelf.renew()
            self.turn += 1
        key = key_of(name)
        own = [(shelf, shelf.own[key]) for shelf in self._layers.values() if key in shelf.own]
        for shelf, low in _laid_out(name, own):
            shelf.grouped.take(number, low)
        self._laid[name] = _Laid(name, number, own)

    def _put_away(self, name: str) -> None:
        laid = self._laid.pop(name)
        for shelf in laid.shelves:
            shelf.grouped.drop(laid.number)

    def put_up(self) -> None:
        """Stand-ins take the layers' places."""
        for shelf in self._layers.values():
            for holder, leaf in shelf.holders:
                holder._modules[leaf] = shelf.stand_in  # as setattr does where a module stands already, in no time
        self._up = True

    def take_down(self) -> None:
        for shelf in self._layers.values() if self._up else ():
            for holder, leaf in shelf.holders:
                holder._modules[leaf] = shelf.stand
        self._up = False

    def linear(self, module: nn.Module) -> Grouped | None:
        """The product of a layer of the model, adapters and all; None where it is not to be had in one call."""
        if isinstance(module, _StandIn):
            grouped = module.shelf.grouped
            return None if grouped.weight is None else grouped
        plain = type(module) is nn.Linear and not _is_hooked(module)
        return _bare(module) if plain and serves_grouped(module.weight) else None  # type: ignore[arg-type]


class _Laid:
    """An adapter that is laid out, by number, and what it was laid out from."""

    def __init__(self, name: str, number: int, own: list[tuple[_Shelf, LowRank]]) -> None:
        self.number, self._key = number, key_of(name)
        self.shelves = [shelf for shelf, _ in own]
        self._factors = [factors for _, factors in own]
        self._places = [shelf.own for shelf in self.shelves]
        self._held = [tensors for factors in self._factors for tensors in _holding(factors)]
        self._tensors = self._now()
        self._versions = list(map(_version, self._tensors))

    def _now(self) -> list[Tensor]:
        return [tensor for held in self._held for tensor in held.values() if tensor is not None]

    def has_gone(self) -> bool:
        """Whether factors are no longer where they were, as where another adapter has its name.

        Of one that has none here that cannot be told, and costs nothing to lay out again.
        """
        return not self._factors or not all(map(is_, [own.get(self._key) for own in self._places], self._factors))

    def is_as_it_was(self) -> bool:
        """Whether no tensor was replaced or written to."""
        now = self._now()
        same = len(now) == len(self._tensors) and all(map(is_, now, self._tensors))
        return same and list(map(_version, now)) == self._versions


class _Shelf:
    """One layer's: the factors of every adapter that changes it.

    Attributes:
        holders: where the layer stands: modules and their names for it.
        own: what the layer holds for each adapter, by key.
        grouped: the same for as long as the base's weight is and there is room.
    """

    def __init__(self, stand: AdaptedLayer, rack: Rack, holders: list[tuple[nn.Module, str]]) -> None:
        self.stand, self.rack, self.holders = stand, rack, holders
        self.own: dict[str, Any] = stand.adapters._modules
        self.dtype = stand.kind.dtype(stand.base)
        self._weights = stand.base._parameters
        self.grouped = self._grouped({})
        self.stand_in = _StandIn(self)

    def has_changed(self) -> bool:
        """Whether the base has another weight, as where an adapter is merged into it."""
        return self._weights.get("weight") is not self._weight

    def renew(self) -> None:
        self.grouped = self._grouped(self.grouped.lows)

    def _grouped(self, lows: dict[int, Low]) -> Grouped:
        self._weight = held = self._weights.get("weight")
        dense = type(self.stand.kind) is LinearKind and held is not None and held.is_contiguous()
        size = self.stand.kind.held(self.stand.base).shape
        return Grouped(held if dense else None, self.stand.base.bias, (size[0], size[1]), lows, self.rack.room)

    def product(self, x: Tensor) -> Tensor:
        """`[N, O]` of x `[N, I]`, a row a token of the step."""
        x, kind = x.contiguous(), self.stand.kind
        if self.grouped.weight is not None and len(x) <= _FEW:
            return self.grouped.product(x, self.rack.adapters)
        y = kind.adapted(self.stand.base, x, [], compiled=True)
        return self.grouped.added(x, y, self.rack.adapters)


class _StandIn(nn.Module):
    """Stands in for an adapted layer."""

    def __init__(self, shelf: _Shelf) -> None:
        super().__init__()
        self.__dict__["shelf"] = shelf  # no part of the model: what walks over its modules must not find a layer twice

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["shelf"].stand, name)

    def forward(self, x: Tensor) -> Tensor:
        shelf: _Shelf = self.shelf
        if x.numel() != len(shelf.rack.adapters.of_rows) * x.shape[-1]:
            return shelf.stand(x)  # not the tokens of the step: the route knows what they are, or that they are not
        return shelf.product(x.view(-1, x.shape[-1])).view(*x.shape[:-1], -1)


@torch.no_grad()
def _laid_out(name: str, own: Iterable[tuple[_Shelf, LowRank]]) -> Iterator[tuple[_Shelf, Low]]:
    """An adapter's factors, layer by layer, but those in which no direction is left."""
    by_dtype: dict[torch.dtype, list[tuple[_Shelf, LowRank]]] = {}
    for shelf, factors in own:
        if not factors.empty:
            by_dtype.setdefault(shelf.dtype, []).append((shelf, factors))
    for dtype, some in by_dtype.items():
        parts = []
        for shelf, factors in some:
            gain = None if factors.m is None else shelf.stand.part(name, 0, 0).gain
            parts.append((*factors.factors(), factors.scale, gain))
        yield from zip((shelf for shelf, _ in some), laid_out(parts, dtype), strict=True)


def _holding(factors: LowRank) -> Iterator[dict[str, Any]]:
    """Where the tensors lie that its product is made of: parameters, and which directions take part if that is said."""
    yield factors._parameters
    if factors.lam is not None:
        yield factors._buffers


def _bare(layer: Any) -> Grouped:
    return Grouped(layer.weight.detach(), layer.bias, tuple(layer.weight.shape), {})


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
