"""The adapters of a bank laid out for serving: at every layer the factors of all of them, in the base's number format.

While the engine holds a model, a stand-in takes the place of each adapted linear layer and takes every row of a step
through the factors of its own adapter, by number.  What the rack does not serve (embeddings, convolutions, modules
trained whole, experts) stays as the bank has it and follows the route.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.kernels.grouped import Adapters, Grouped, Low, serves_grouped
from rankwise.surgery.bank import Bank
from rankwise.surgery.kinds import LinearKind
from rankwise.surgery.layer import AdaptedLayer

_FEW = 64  # rows up to which one call makes the base's product and what is added to it


class Rack:
    """Of a bank; `refresh` after every change of it.

    Attributes:
        adapters: of the step that runs.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.adapters = Adapters.of([])
        self._numbers: dict[str | None, int] = {None: -1}
        self._layers: dict[str, _Shelf] = {}
        self._up = False

    def number(self, name: str | None) -> int:
        return self._numbers[name] if self.bank.router.merged is None else -1

    @property
    def nbytes(self) -> int:
        """Of the factors that are laid out."""
        return sum(kept.low.nbytes for shelf in self._layers.values() for kept in shelf.kept.values())

    def refresh(self) -> None:
        """Takes in what the bank holds now."""
        for name in self.bank.names:
            if name not in self._numbers:
                taken = set(self._numbers.values())
                self._numbers[name] = next(i for i in range(len(taken) + 1) if i not in taken)
        self._numbers = {name: n for name, n in self._numbers.items() if name is None or name in self.bank}
        layers = {}
        for path, holders, stand in self._stands():
            shelf = self._layers.get(path)
            layers[path] = _Shelf(stand, self) if shelf is None or shelf.stand is not stand else shelf
            layers[path].refresh(self._numbers)
            layers[path].holders = holders
        self._layers = layers

    def _stands(self) -> Iterator[tuple[str, list[tuple[nn.Module, str]], AdaptedLayer]]:
        """The layers that are served, and where each stands in the model."""
        for path, site in self.bank.sites.items():
            holders = []
            for place in (path, *site.aliases):
                parent, _, leaf = place.rpartition(".")
                holders.append((self.bank.model.get_submodule(parent), leaf))
            module = getattr(*holders[0])
            served = isinstance(module, AdaptedLayer) and isinstance(module.kind, LinearKind)
            if served and "expert" not in path.lower() and not _is_hooked(module.base):
                yield path, holders, module

    def put_up(self) -> None:
        """Stand-ins take the layers' places."""
        for shelf in self._layers.values():
            for holder, leaf in shelf.holders:
                setattr(holder, leaf, shelf.stand_in)
        self._up = True

    def take_down(self) -> None:
        for shelf in self._layers.values() if self._up else ():
            for holder, leaf in shelf.holders:
                setattr(holder, leaf, shelf.stand)
        self._up = False

    def linear(self, module: nn.Module) -> Grouped | None:
        """The product of a layer of the model, adapters and all; None where it is not to be had in one call."""
        if isinstance(module, _StandIn):
            grouped = module.shelf.grouped
            return None if grouped.weight is None else grouped
        plain = type(module) is nn.Linear and not _is_hooked(module)
        return _bare(module) if plain and serves_grouped(module.weight) else None  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Kept:
    """An adapter's part as it is laid out, and what it was laid out from."""

    low: Low
    factors: Any
    version: tuple[tuple[int, int], ...]


class _Shelf:
    """One layer's: the factors of every adapter that changes it.

    Attributes:
        holders: where the layer stands: modules and their names for it.
        grouped: made anew only where something has changed, so that who holds it can tell.
    """

    def __init__(self, stand: AdaptedLayer, rack: Rack) -> None:
        self.stand, self.rack = stand, rack
        self.kept: dict[int, _Kept] = {}
        self.holders: list[tuple[nn.Module, str]] = []
        self.grouped = self._grouped()
        self.stand_in = _StandIn(self)

    def refresh(self, numbers: dict[str | None, int]) -> None:
        stand, kept, same = self.stand, {}, True
        for name, number in numbers.items():
            factors = stand.of(name)
            if factors is None:
                continue
            known, version = self.kept.get(number), _version(factors)
            if known is None or known.factors is not factors or known.version != version:
                if factors.empty:
                    continue
                with torch.no_grad():
                    part = stand.part(str(name), 0, 0)
                    low = Low(part.A, part.B, part.scale, part.gain, stand.kind.dtype(stand.base))
                known, same = _Kept(low, factors, version), False
            kept[number] = known
        same = same and kept.keys() == self.kept.keys() and self._dense() is self.grouped.weight
        self.kept = kept
        if not same:
            self.grouped = self._grouped()

    def _dense(self) -> Tensor | None:
        """The base's weight where it is one, its rows close."""
        held = getattr(self.stand.base, "weight", None)
        return held if type(self.stand.kind) is LinearKind and held is not None and held.is_contiguous() else None

    def _grouped(self) -> Grouped:
        lows = {number: one.low for number, one in self.kept.items()}
        size = self.stand.kind.held(self.stand.base).shape
        return Grouped(self._dense(), self.stand.base.bias, (size[0], size[1]), lows)

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


def _version(factors: Any) -> tuple[tuple[int, int], ...]:
    """Changes when a tensor is replaced or written to."""
    tensors = (*factors._parameters.values(), *factors._buffers.values())
    return tuple((id(tensor), tensor._version) for tensor in tensors if tensor is not None)


def _bare(layer: Any) -> Grouped:
    return Grouped(layer.weight.detach(), layer.bias, tuple(layer.weight.shape), {})


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
