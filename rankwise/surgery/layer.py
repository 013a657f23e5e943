"""The one adapted layer, and its sibling for modules that are trained whole.

Both stand in the place of a module of the model, hold it as `base`, and keep what is each adapter's own under a key
made from its name: '.' is not allowed in a module's key and ':' not in a name, and a name that a dictionary of modules
has for itself ("double", "keys") gets a ':' before it, where no name has a '.'; so the map is one to one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from rankwise.adapters.dropout import keep_mask, mixed
from rankwise.adapters.lowrank import LowRank, gains
from rankwise.errors import RouteError
from rankwise.kernels.lowrank import Part
from rankwise.surgery.routing import Mix, Prefix, Route, Router, Way, members_of
from rankwise.surgery.sites import Site

_TAKEN = frozenset(dir(nn.ModuleDict()))


def key_of(name: str) -> str:
    return f":{name}" if name in _TAKEN else name.replace(".", ":")


def name_of(key: str) -> str:
    """The inverse of `key_of`."""
    return key[1:] if key.startswith(":") else key.replace(":", ".")


class Stand(nn.Module):
    """Stands where `base` stood; what it does not define itself it asks of `base` (weight, in_features, …)."""

    base: Any

    def __init__(self, path: str, base: nn.Module, router: Router) -> None:
        super().__init__()
        self.path = path
        self.base = base
        self.router = router
        self.adapters = nn.ModuleDict()
        self.train(base.training)
        self.register_state_dict_post_hook(_name_as_base)
        self.register_load_state_dict_pre_hook(_name_as_held)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def of(self, name: Way) -> Any:
        """What this layer holds for an adapter, whole or not, or None, as for adapters that are mixed."""
        key = "" if name is None or isinstance(name, Mix) else key_of(members_of(name)[0])
        return self.adapters[key] if key in self.adapters else None  # noqa: SIM401 (a ModuleDict has no get)

    def admit(self, name: str, own: Any, seed: int) -> None:
        """Takes in what is an adapter's own."""
        raise NotImplementedError

    def dismiss(self, name: str) -> None:
        """Forgets what is an adapter's own, if there is any."""
        if key_of(name) in self.adapters:
            del self.adapters[key_of(name)]


def _name_as_base(stand: Stand, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """In a state dict the base keeps its own names, so that what is saved of the model loads as the base it is."""
    held = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    inside = f"{prefix}base."
    state.update({prefix + key[len(inside) :] if key.startswith(inside) else key: held[key] for key in held})


def _name_as_held(stand: Stand, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The inverse, for loading."""
    for name in stand.base.state_dict():
        if prefix + name in state:
            state[f"{prefix}base.{name}"] = state.pop(prefix + name)


class AdaptedLayer(Stand):
    """A linear, convolution or embedding layer through which each unit of the route takes its own adapter."""

    def __init__(self, site: Site, router: Router, number: int) -> None:
        super().__init__(site.path, site.module, router)
        self.kind, self.number = site.kind, number
        self.seeds: dict[str, int] = {}
        self._known_norms: dict[str, Any] = {}  # name → A, B, and the norms they gave

    def admit(self, name: str, own: LowRank, seed: int) -> None:
        device = self.kind.held(self.base).device
        own = own if own.A.device == device else own.to(device)
        self.adapters[key_of(name)] = own if own.training == self.training else own.train(self.training)
        if own.m is not None:
            own.meet(self.kind.weight(self.base))
        self.seeds[name] = seed
        self._known_norms.pop(name, None)

    def dismiss(self, name: str) -> None:
        super().dismiss(name)
        self._known_norms.pop(name, None)

    def forward(self, x: Tensor) -> Tensor:
        parts = self._parts(x)
        if not parts and not self.router.compiled:
            return self.base(x)
        return self.kind.adapted(self.base, x, parts, compiled=self.router.compiled)

    def _parts(self, x: Tensor) -> list[Part]:
        if self.router.merged is not None or not any(self._taking(way) for way in self.router.route.names):
            return []
        return [
            self.mixed(way, start, stop)
            if isinstance(way, Mix)
            else self.part(way, start, stop, self._mask(members_of(way)[0], stop - start, x))
            for way, start, stop in self.router.spans(x.shape, self.kind.width_dims, self.path)
            if way is not None and self._taking(way)
        ]

    def _taking(self, way: Way) -> list[str]:
        """The adapters on a way that change something here."""
        return [name for name in members_of(way) if self.of(name) is not None and not self.of(name).empty]

    def _norms(self, name: str, factors: LowRank) -> Tensor:
        """Of form `dora`; computed again when a factor has changed, not for each micro-batch of a step.

        Factors are compared by value: torch's fused optimisers write to a tensor without counting its version up.
        """
        A, B, norms = self._known_norms.get(name, (None, None, None))
        if A is None or A.device != factors.A.device or not (torch.equal(A, factors.A) and torch.equal(B, factors.B)):
            norms = factors.norms(self.kind.held(self.base), self.kind.dtype(self.base))
            self._known_norms[name] = factors.A.detach().clone(), factors.B.detach().clone(), norms
        return norms

    def _mask(self, name: str, rows: int, x: Tensor) -> Tensor | None:
        """Of an adapter's dropout, over its rows of an input."""
        dropout = self.of(name).dropout
        if not dropout or not self.training or self.kind.lookup:
            return None
        shape = torch.Size((rows, *x.shape[x.dim() - self.kind.width_dims :]))
        return keep_mask(shape, dropout, mixed(self.seeds[name], self.number, self.router.tick), x.device)

    def part(self, way: str | Prefix, start: int, stop: int, keep: Tensor | None = None) -> Part:
        """An adapter, or its first directions, for some rows of an input."""
        factors = self.of(way)
        if isinstance(way, Prefix):
            A, B, scale = factors.prefix(way.rank, way.scaling)
            return Part(start, stop, A, B, scale, factors.dropout, keep)
        A, B = factors.factors()
        gain = None if factors.m is None else gains(factors.m, self._norms(way, factors))
        return Part(start, stop, A, B, factors.scale, factors.dropout, keep, gain)

    def mixed(self, mix: Mix, start: int, stop: int) -> Part:
        """Adapters in a weighted sum for some rows, as one: their ranks stand side by side, their weights are in B.

        Raises:
            RouteError: in training mode an adapter has dropout, whose mask would be each one's own.
        """
        weights, names = dict(mix.weights), self._taking(mix)
        if self.training and not self.kind.lookup and any(self.of(name).dropout for name in names):
            raise RouteError(f"{mix}: has dropout, and is in training mode", hint="model.eval(), or train one of them")
        factors = [self.of(name).factors() for name in names]
        scales = [weights[name] * self.of(name).scale for name in names]
        A = torch.cat([A for A, _ in factors])
        B = torch.cat([scale * B for scale, (_, B) in zip(scales, factors, strict=True)], dim=1)
        return Part(start, stop, A, B, 1.0, 0.0, None, None)


def _twin(base: nn.Module) -> nn.Module:
    """A copy that shares the model's configs, so that what is set there (how to attend) holds for it too."""
    values = [value for module in base.modules() for value in vars(module).values()]
    return copy.deepcopy(base, {id(value): value for value in values if isinstance(value, PreTrainedConfig)})


class CopiedLayer(Stand):
    """A module of which each adapter that trains it whole has its own copy: float32, rounded for the forward pass.

    A parameter that is read off it, as losses read the head's weight, is that of the adapter that takes everything.
    """

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if not isinstance(found, nn.Parameter):
            return found
        route = self._route()
        twin = self.of(route.runs[0][0]) if len(route.runs) == 1 else None
        return found if twin is None else twin.get_parameter(name).to(found.dtype)

    @torch.no_grad()
    def admit(self, name: str, own: Mapping[str, Tensor], seed: int) -> None:
        twin = _twin(self.base).float().requires_grad_(True).train(self.training)
        for part, tensor in own.items():
            twin.get_parameter(part).copy_(tensor)
        self.adapters[key_of(name)] = twin

    def forward(self, *inputs: Any, **named: Any) -> Any:
        route = self._route()
        if len(route.runs) == 1 or all(self.of(name) is None for name in route.names):
            return self._through(route.runs[0][0], *inputs, **named)
        try:
            return self._piecewise(route, *inputs, **named)
        except (RouteError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise RouteError(
                f"{self.path}: trained whole by an adapter, and not a module that takes tokens one by one: {error}",
                hint="route one adapter at a time with bank.use(name)",
            ) from error

    def _route(self) -> Route:
        merged = self.router.merged
        return self.router.route if merged is None else Route.whole(merged)

    def _piecewise(self, route: Route, *inputs: Any, **named: Any) -> Tensor:
        x, *rest = inputs
        if route.unit == "tokens":  # [1, tokens, ...]: a norm, a head or an embedding, one token at a time
            x = x.squeeze(0)
        spans = self.router.spans(x.shape, x.dim() - 1, self.path)
        out = torch.cat([self._through(name, x[start:stop], *rest, **named) for name, start, stop in spans])
        return out.unsqueeze(0) if route.unit == "tokens" else out

    def _through(self, name: Way, *inputs: Any, **named: Any) -> Any:
        twin = self.of(name)
        if twin is None:
            return self.base(*inputs, **named)
        return functional_call(twin, self.rounded(twin), inputs, named)

    def settle(self, name: str) -> None:
        """Gives the base an adapter's parameters for good; a parameter shared with another module is left to that."""
        twin = self.of(name)
        for part, tensor in self.rounded(twin).items() if twin is not None else ():
            owner, _, leaf = part.rpartition(".")
            setattr(self.base.get_submodule(owner), leaf, nn.Parameter(tensor.detach(), requires_grad=False))

    def rounded(self, twin: nn.Module) -> dict[str, Tensor]:
        """A copy's parameters in the number format of the base."""
        types = {part: parameter.dtype for part, parameter in self.base.named_parameters()}
        return {part: parameter.to(types[part]) for part, parameter in twin.named_parameters()}
