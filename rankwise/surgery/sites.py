"""The layers of a model that an adapter can change, and which of them a spec means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from rankwise.adapters.lowrank import SiteShape
from rankwise.adapters.presets import Role, calls_itself_attention, linear_role
from rankwise.adapters.selection import Place, choose, is_called
from rankwise.adapters.spec import LoraSpec
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
        TargetError: lists every name, pattern and block number that matches nothing, and what there is.
    """
    places = {path: Place((path, *site.aliases), site.role) for path, site in sites.items()}
    return [sites[path] for path in choose(spec, places, modules)]


def choose_modules(names: Sequence[str], chosen: Sequence[Site], modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the layers to be trained whole, of all `modules`.

    Raises:
        TargetError: a name matches nothing, a layer that holds or is a targeted site, one inside another that is to be
            trained whole, or one with running statistics.
    """
    found: list[str] = []
    problems: list[str] = []
    for name in names:
        paths = [path for path in modules if path and is_called(name, [path])]
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
