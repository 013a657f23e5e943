"""Norms, gated activations and rotary embeddings of a model, run by the compiled kernels while the engine holds it.

A block is recognised by what it does, not by its name: its output on a probe is compared with the kernel's, and only
where they agree does the kernel stand in.  So a new model is served without a table, and a look-alike that differs
(another epsilon, an offset, a clamp) is left alone.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.kernels.gate import ACTIVATIONS, gated
from rankwise.kernels.library import serves
from rankwise.kernels.norm import rms_norm
from rankwise.kernels.rotary import rotated, serves_rotary
from rankwise.surgery.kinds import Kind, LinearKind, kind_of
from rankwise.surgery.layer import Stand
from rankwise.surgery.sites import head_of

_ALIKE = 1e-2  # relative: two roundings to bfloat16 differ by about 4e-3
_ROTARY = "apply_rotary_pos_emb"  # a function of each of transformers' modelling files, looked up at every call


class _Norm(nn.Module):
    """Stands in for an RMS norm with a frozen weight."""

    def __init__(self, weight: Tensor, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


class _GatedFeedForward(nn.Module):
    """Stands in for down(act(gate(x)) ∘ up(x)); the three layers stay the model's, adapters and all."""

    def __init__(self, block: Any, activation: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = block.gate_proj, block.up_proj, block.down_proj
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.activation))


class _Linear(nn.Module):
    """Stands in for a linear layer that no adapter changes."""

    def __init__(self, base: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.base, self.kind = base, kind

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.adapted(self.base, x, [], compiled=True)


class _Rotary:
    """Stands in for a modelling file's rotary function, which has what the kernel does not take.

    The file is shared by all models of a family: the last engine to let go of it puts the function back.
    """

    def __init__(self, home: ModuleType, original: Callable[..., Any]) -> None:
        self.home, self.original, self.holders = home, original, 0

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 4 or not all(serves_rotary(x, *inputs[2:]) for x in inputs[:2]):
            return self.original(*inputs, **named)
        q, k, cos, sin = inputs
        return rotated(q, cos, sin), rotated(k, cos, sin)


@contextmanager
def fused_blocks(model: nn.Module) -> Iterator[int]:
    """Within it, blocks that the kernels can run are run by them.

    Yields how many norms and feed-forward blocks; linear layers and rotary embeddings are not counted.
    """
    with _replaced(model, _linear_stand_ins(model)), _replaced(model, _stand_in) as count, _fused_rotary(model):
        yield count


@contextmanager
def _replaced(model: nn.Module, stand_in_for: Callable[[nn.Module], nn.Module | None]) -> Iterator[int]:
    places = []
    for path, module in list(model.named_modules()):
        stand_in = None if isinstance(module, Stand) or ".adapters." in f".{path}." else stand_in_for(module)
        if stand_in is not None:
            parent, _, leaf = path.rpartition(".")
            places.append((model.get_submodule(parent), leaf, module, stand_in))
    try:
        for parent, leaf, _, stand_in in places:
            setattr(parent, leaf, stand_in)
        yield len(places)
    finally:
        for parent, leaf, module, _ in places:
            setattr(parent, leaf, module)


def _linear_stand_ins(model: nn.Module) -> Callable[[nn.Module], nn.Module | None]:
    """For layers that no adapter changes, but the output layer, which engine/head.py takes in chunks."""
    held = [stand.base for stand in model.modules() if isinstance(stand, Stand)]
    others = {id(module) for base in held for module in base.modules()} | {id(head_of(model))}

    def stand_in(module: nn.Module) -> nn.Module | None:
        kind = kind_of(module)
        if not isinstance(kind, LinearKind) or id(module) in others:
            return None
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        return _Linear(module, kind) if frozen and serves(*module.parameters()) else None

    return stand_in


@contextmanager
def _fused_rotary(model: nn.Module) -> Iterator[None]:
    names = {type(module).__module__ for module in model.modules()} if any(map(serves, model.parameters())) else set()
    found = [_rotary_of(sys.modules[name]) for name in names & sys.modules.keys()]
    stand_ins = [stand_in for stand_in in found if stand_in is not None]
    try:
        for stand_in in stand_ins:
            stand_in.holders += 1
            setattr(stand_in.home, _ROTARY, stand_in)
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.holders -= 1
            if not stand_in.holders:
                setattr(stand_in.home, _ROTARY, stand_in.original)


@torch.no_grad()
def _rotary_of(home: ModuleType) -> _Rotary | None:
    function: Any = getattr(home, _ROTARY, None)
    if isinstance(function, _Rotary):  # another engine's; from another file if it was imported meanwhile
        return function if function.home is home else _Rotary(home, function.original)
    noise = _noise(7, 2, 5, 16).bfloat16()
    q, k, cos, sin = noise[:3].transpose(0, 1), noise[3:5].transpose(0, 1), noise[5], noise[6]
    try:
        want = function(q, k, cos, sin)
        same = len(want) == 2 and all(_alike(rotated(x, cos, sin), y) for x, y in zip((q, k), want, strict=True))
    except Exception:  # no such function, or one that takes something else
        return None
    return _Rotary(home, function) if same else None


@torch.no_grad()
def _stand_in(module: nn.Module) -> nn.Module | None:
    if not _takes_one(module):
        return None
    try:
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            return _as_gated(module)
        parameters = dict(module.named_parameters())
        if parameters.keys() == {"weight"} and parameters["weight"].dim() == 1 and not list(module.children()):
            return _as_norm(module, parameters["weight"])
    except Exception:  # another's module on a probe it was not made for: whatever it raises, it is not ours
        return None
    return None


def _takes_one(module: nn.Module) -> bool:
    """Whether one tensor is all it can be given: a norm with a gate is a plain one on a probe without."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 1 and parameters[0].kind in positional


def _as_norm(module: nn.Module, weight: Tensor) -> nn.Module | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight.requires_grad or not isinstance(eps, float) or not serves(weight):
        return None
    sizes = torch.tensor([1e-3, 1.0, 30.0]).repeat_interleave(3).unsqueeze(1)  # small rows make epsilon show
    probe = (sizes * (_noise(9, len(weight)) + 0.5)).to(weight.dtype)  # a mean tells RMS norms from layer norms
    want = module(probe)
    for offset in (0.0, 1.0):
        if _alike(rms_norm(probe, weight, eps, offset), want):
            return _Norm(weight, eps, offset)
    return None


def _as_gated(block: Any) -> nn.Module | None:
    weight = getattr(block.gate_proj, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not serves(weight):
        return None
    probe = (2 * _noise(9, weight.shape[1])).to(weight.dtype).unsqueeze(0)
    want = block(probe)
    for activation in ACTIVATIONS:
        stand_in = _GatedFeedForward(block, activation)
        if isinstance(want, Tensor) and _alike(stand_in(probe), want):
            return stand_in
    return None


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _alike(got: Tensor, want: Tensor) -> bool:
    """Row by row, so that no large row hides a small one."""
    got, want = got.float().flatten(0, -2), want.float().flatten(0, -2)
    return bool(((got - want).norm(dim=-1) <= _ALIKE * want.norm(dim=-1)).all())
