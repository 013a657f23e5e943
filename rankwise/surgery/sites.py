"""The layers of a model that an adapter can change, and which of them a spec means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from rankwise.adapters.lowrank import SiteShape
from rankwise.adapters.presets import TARGET_ROLES, Role, calls_itself_attention, linear_role
from rankwise.adapters.spec import LoraSpec, matching_pattern
from rankwise.errors import TargetError, listing, nearest
from rankwise.surgery.kinds import Kind, kind_of


@dataclass(frozen=True, eq=False)
class Site:
    """One layer: its first path in the model, the other paths of the same module, and what it is."""

    path: str
    aliases: tuple[str, ...]
    module: nn.Module
    kind: Kind
    role: Role
    shape: SiteShape


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every layer that can be adapted, by path, in the model's order.  A module with several paths is one site."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    head = head_of(model)
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or not path:
            continue
        role = "head" if module is head else _role(model, path, kind)
        found[path] = Site(path, tuple(paths[id(module)][1:]), module, kind, role, kind.shape(module))
    return found


def head_of(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits of hidden states, where a model says which."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def _role(model: nn.Module, path: str, kind: Kind) -> Role:
    if kind.name in ("convolution", "embedding"):
        return cast(Role, kind.name)
    return linear_role(path, _in_attention(model, path.split(".")[:-1]))


def _in_attention(model: nn.Module, parents: Sequence[str]) -> bool:
    """Whether a layer above calls itself attention: by its class, or by its own name (`attn`, `self_attn`, …)."""
    module: nn.Module = model
    for part in parents:
        module = getattr(module, part)
        if "attention" in type(module).__name__.lower() or calls_itself_attention(part):
            return True
    return False


def choose_sites(spec: LoraSpec, sites: Mapping[str, Site], modules: Sequence[str]) -> list[Site]:
    """The sites a spec means, in the model's order; `modules` are all module paths, for the error message.

    Raises:
        TargetError: lists every name and pattern that matches nothing, and what there is.
    """
    problems: list[str] = []
    if isinstance(spec.targets, str):
        # A preset means what is there to be adapted: not what the same spec trains whole.
        chosen = _outside(spec.modules_to_save, _by_preset(spec.targets, sites)) or _by_regex(spec.targets, sites)
        if not chosen:
            problems.append(f"targets {spec.targets!r} match no layer")
    else:
        chosen = {}
        for name in spec.targets:
            named = {path: site for path, site in sites.items() if _is_called(name, path, *site.aliases)}
            chosen.update(named)
            if not named:
                problems.append(_unmatched(name, sites, modules))
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, float] = getattr(spec, field)
        used = {matching_pattern(patterns, path) for path in chosen}
        problems += [f"{field} {key!r} matches none of the targeted layers" for key in patterns if key not in used]
    if problems:
        raise TargetError(f"the spec does not fit the model:\n{listing(problems)}", hint=_what_there_is(sites))
    return [site for path, site in sites.items() if path in chosen]


def _by_preset(word: str, sites: Mapping[str, Site]) -> dict[str, Site]:
    roles = TARGET_ROLES.get(word, frozenset())
    return {path: site for path, site in sites.items() if site.role in roles}


def _outside(whole: Sequence[str], chosen: dict[str, Site]) -> dict[str, Site]:
    def held(path: str) -> bool:
        parts = path.split(".")
        return any(_is_called(name, ".".join(parts[:i])) for name in whole for i in range(1, len(parts) + 1))

    return {path: site for path, site in chosen.items() if not held(path)}


def _by_regex(pattern: str, sites: Mapping[str, Site]) -> dict[str, Site]:
    matches = re.compile(pattern).fullmatch
    return {path: site for path, site in sites.items() if any(map(matches, (path, *site.aliases)))}


def _is_called(name: str, *paths: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _unmatched(name: str, sites: Mapping[str, Site], modules: Sequence[str]) -> str:
    if any(_is_called(name, path) for path in modules):
        return f"{name!r} is a module that cannot be adapted (only linear, Conv1D, ungrouped convolution and embedding)"
    return f"{name!r} matches no layer{nearest(name, sorted(_leaves(sites)))}"


def _leaves(sites: Mapping[str, Site]) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in sites}


def _what_there_is(sites: Mapping[str, Site]) -> str:
    if not sites:
        return "the model has no layer that can be adapted"
    return f"layers here: {', '.join(sorted(_leaves(sites)))}; presets: {', '.join(TARGET_ROLES)}"


def choose_modules(names: Sequence[str], chosen: Sequence[Site], modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the layers to be trained whole, of all `modules`.

    Raises:
        TargetError: a name matches nothing, a layer that holds or is a targeted site, one inside another that is to be
            trained whole, or one with running statistics.
    """
    found: list[str] = []
    problems: list[str] = []
    for name in names:
        paths = [path for path in modules if path and _is_called(name, path)]
        if not paths:
            problems.append(f"{name!r} matches no module{nearest(name, [m.rsplit('.', 1)[-1] for m in modules])}")
        found += paths
    for path in found:
        within = [site.path for site in chosen if site.path == path or site.path.startswith(f"{path}.")]
        if within:
            problems.append(f"{path!r} is to be trained whole but holds targeted {within[0]!r}")
        around = next((other for other in found if path.startswith(f"{other}.")), None)
        if around is not None:
            problems.append(f"{path!r} is to be trained whole and is inside {around!r}, which is too: name one of them")
        if kept := _statistics(modules[path]):
            problems.append(
                f"{path!r} is to be trained whole but keeps statistics that are not trained ({', '.join(kept)}), "
                "which an adapter does not store"
            )
    if problems:
        raise TargetError(f"modules_to_save does not fit the model:\n{listing(problems)}")
    return list(dict.fromkeys(found))


def _statistics(module: nn.Module) -> list[str]:
    """Buffers that belong to a module's state, as BatchNorm's running mean does."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return [name for name in module.state_dict() if name in buffers - parameters]
