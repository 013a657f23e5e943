"""Several adapters of one base made into one, as values: no model in sight.

A site that an adapter does not have counts as ΔW of zero.  Ranks, scales, scalings and targets may differ, and so may
forms, as far as W + ΔW is what they make of W.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.blends import Blend, Changes, added, dare, knots, linear, nearest, ties
from rankwise.adapters.dropout import mixed
from rankwise.adapters.lowrank import LowRank
from rankwise.adapters.recipe import Recipe
from rankwise.adapters.scaling import alpha_of
from rankwise.adapters.spec import LoraSpec, exactly
from rankwise.errors import RankwiseWarning, SpecError, listing

_NO_SUM = (
    "rankwise merge makes a model of base and adapter, which keeps what it does; what can be combined is of form lora "
    "or adalora"
)
_NO_MEAN = "leave all but one of them out, or train them without modules_to_save or with the same tokens in one run"
_OTHER_METHOD = "methods cat and svd take adapters of any rank"


@dataclass(frozen=True)
class Combination:
    """What became of several adapters.

    Attributes:
        adapter: of form `lora`.
        recipe: how it was made.
        weights: of every adapter by its name; those of weight 0 were left out.
        blends: of each site, how far what is kept is from what the method meant (of `linear`: from the sum).
        taken: what cannot be weighted, each with the adapters that had it: layers trained whole and rows of tokens.
    """

    adapter: Adapter
    recipe: Recipe
    weights: Mapping[str, float]
    blends: Mapping[str, Blend]
    taken: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """‖what was meant - what is kept‖ / ‖what was meant‖, over all sites; 0 where nothing was meant."""
        meant = math.hypot(*(blend.meant for blend in self.blends.values()))
        return math.hypot(*(blend.missed for blend in self.blends.values())) / meant if meant else 0.0

    @property
    def errors(self) -> dict[str, float]:
        """The same of each site by itself."""
        return {path: blend.missed / blend.meant if blend.meant else 0.0 for path, blend in self.blends.items()}

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        recipe, nature = self.recipe, self.recipe.nature
        return {
            "method": recipe.method,
            "makes": recipe.makes,
            "chosen": recipe.chosen,
            "weights": dict(self.weights),
            "density": recipe.kept if nature.density else None,
            "seed": (recipe.seed or 0) if nature.random else None,
            "ranks": {path: blend.factors.rank for path, blend in self.blends.items()},
            "error": self.error,
            "errors": self.errors,
            "taken": {path: list(names) for path, names in self.taken.items()},
        }


def combine(
    adapters: Mapping[str, Adapter], recipe: Recipe | None = None, advance: Callable[[float], None] | None = None
) -> Combination:
    """One adapter out of several.

    Args:
        adapters: by name; all of one base, which is not checked here.
        recipe: how; without one their ΔW are added, exactly.
        advance: is told how far it is, from 0 to 1.

    Warns:
        RankwiseWarning: of method `linear`, how far it is from the sum.

    Raises:
        SpecError: there is none, not a weight for each, or some cannot be combined; lists all that is in the way.
    """
    recipe = recipe or Recipe()
    weights = recipe.weights_of(list(adapters))
    refuse(obstacles(adapters, recipe, weights))
    used = {name: own.plain() for name, own in adapters.items() if weights[name]}
    blends = {}
    paths = list(dict.fromkeys(path for own in used.values() for path in own.sites))
    for number, path in enumerate(paths):
        changes = [(weights[name], _here(own.sites[path])) for name, own in used.items() if path in own.sites]
        seeds = [_seed(recipe, path, number) for number, own in enumerate(used.values()) if path in own.sites]
        blends[path] = _blended(recipe, changes, seeds)
        if advance is not None:
            advance((number + 1) / len(paths))
    found = _assembled(used, {path: blend.factors for path, blend in blends.items()})
    made = Combination(found, recipe, weights, blends, _taken(used))
    if recipe.method == "linear" and made.error > 1e-6:
        said = f"linear adds up factors: its ΔW differs from the sum of the adapters' by {made.error:.0%} of its norm"
        warnings.warn(f"{said}; cat and svd give the sum", RankwiseWarning, 2)
    return made


def _here(factors: LowRank) -> LowRank:
    """In main memory, where everything is computed."""
    if factors.A.device.type == "cpu":
        return factors
    return LowRank(factors.A.detach().cpu(), factors.B.detach().cpu(), factors.scale, factors.dropout)


def _blended(recipe: Recipe, changes: Changes, seeds: list[int]) -> Blend:
    rank = recipe.rank or max(factors.rank for _, factors in changes)
    method, density = recipe.method, recipe.kept
    if method == "cat":
        whole = added(changes)
        blend = Blend(whole, 0.0, whole.delta_norm())
    elif method == "svd":
        blend = nearest(added(changes), rank)
    elif method == "linear":
        blend = linear(changes)
    elif method == "ties":
        blend = ties(changes, rank, density)
    elif method == "knots":
        blend = knots(changes, rank, density)
    else:
        blend = dare(changes, rank, density, seeds, elect=method == "dare-ties")
    blend.factors.float()  # computed in float64
    return blend


def _seed(recipe: Recipe, path: str, number: int) -> int:
    """Of one adapter at one site: whatever other sites there are, it is the same."""
    return mixed(recipe.seed or 0, crc32(path.encode()), number)


# ── what is in the way ───────────────────────────────────────────────────────────────────────────────────────────────


def obstacles(adapters: Mapping[str, Adapter], recipe: Recipe, weights: Mapping[str, float]) -> list[tuple[str, str]]:
    """All that keeps adapters from being combined, each with a way out; those of weight 0 are in nobody's way."""
    used = {name: own for name, own in adapters.items() if weights[name]}
    return [*_of_forms(used), *_of_shapes(used, recipe), *_of_whole(used), *_of_layers(used)]


def refuse(problems: Sequence[tuple[str, str]]) -> None:
    """Goes by if there are none.

    Raises:
        SpecError: says all of them.
    """
    if problems:
        ways = "; ".join(dict.fromkeys(hint for _, hint in problems if hint))
        said = listing(problem for problem, _ in problems)
        raise SpecError(f"these adapters cannot be combined:\n{said}", hint=ways)


def _of_forms(used: Mapping[str, Adapter]) -> list[tuple[str, str]]:
    said = "is of form dora: what it makes of W is no sum of W and a change that could be weighted"
    magnitudes = [n for n, own in used.items() if any(factors.m is not None for factors in own.sites.values())]
    return [(f"{name} {said}", _NO_SUM) for name in magnitudes]


def _of_shapes(used: Mapping[str, Adapter], recipe: Recipe) -> list[tuple[str, str]]:
    found, uneven = [], dict[str, list[str]]()
    for path in dict.fromkeys(path for own in used.values() for path in own.sites):
        held = {name: own.sites[path] for name, own in used.items() if path in own.sites}
        shapes = {name: factors.shape for name, factors in held.items()}
        ranks = {name: factors.plain().rank for name, factors in held.items()}
        if len(set(shapes.values())) > 1:
            sizes = [f"{n} {' × '.join(map(str, (s.outputs, s.inputs, *s.kernel)))}" for n, s in shapes.items()]
            found.append((f"{path}: weights of several sizes: {', '.join(sizes)}", "are they of one base?"))
        elif recipe.method == "linear" and len(set(ranks.values())) > 1:
            uneven.setdefault(", ".join(f"{name} {rank}" for name, rank in ranks.items()), []).append(path)
    for said, (first, *others) in uneven.items():
        where = f"{first} and {len(others)} more" if others else first
        found.append((f"{where}: linear needs factors of one rank: {said}", _OTHER_METHOD))
    return found


def _of_whole(used: Mapping[str, Adapter]) -> list[tuple[str, str]]:
    """What more than one adapter has and no weight could be given to, unless it is the same."""
    found = []
    for path, names in _taken(used).items():
        first, *others = (_whole(used[name], path) for name in names)
        if any(other.keys() != first.keys() for other in others) or any(
            not torch.equal(other[part], first[part]) for other in others for part in first
        ):
            found.append((f"{path}: {_what(used[names[0]], path)}, otherwise in each of {', '.join(names)}", _NO_MEAN))
    return found


def _of_layers(used: Mapping[str, Adapter]) -> list[tuple[str, str]]:
    """Layers that one adapter has for itself and another changes."""
    found = []
    for path, names in _taken(used).items():
        for other in (name for name in used if name not in names):
            inside = next((p for p in _paths(used[other]) if p == path or p.startswith(f"{path}.")), None)
            if inside is not None:
                what = _what(used[names[0]], path)
                found.append((f"{path}: {what} in {names[0]}, and {other} changes {inside}", _NO_MEAN))
    return found


def _paths(adapter: Adapter) -> list[str]:
    return [*adapter.sites, *adapter.modules, *adapter.tokens]


def _what(adapter: Adapter, path: str) -> str:
    return "trained whole" if path in adapter.modules else "rows of tokens"


def _whole(adapter: Adapter, path: str) -> dict[str, Any]:
    """The tensors of a layer trained whole, or of rows of tokens."""
    if path in adapter.modules:
        return {name: tensor.detach() for name, tensor in adapter.modules[path].items()}
    return {"ids": adapter.tokens[path].ids, "rows": adapter.tokens[path].rows.detach()}


def _taken(used: Mapping[str, Adapter]) -> dict[str, tuple[str, ...]]:
    """Layers trained whole and rows of tokens, each with the names of those that have them."""
    paths = dict.fromkeys(path for own in used.values() for path in (*own.modules, *own.tokens))
    return {p: tuple(n for n, own in used.items() if p in own.modules or p in own.tokens) for p in paths}


# ── the adapter ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _assembled(used: Mapping[str, Adapter], sites: Mapping[str, LowRank]) -> Adapter:
    modules = {path: own.modules[path] for own in used.values() for path in own.modules}
    tokens = {path: own.tokens[path] for own in used.values() for path in own.tokens}
    return Adapter(_spec(used, sites), sites, modules, tokens=tokens)


def _spec(used: Mapping[str, Adapter], sites: Mapping[str, LowRank]) -> LoraSpec:
    """Which says of every site what it has become."""
    first = next(iter(used.values())).spec
    ranks = {path: factors.rank for path, factors in sites.items()}
    alphas = {path: alpha_of("alpha/r", factors.scale, factors.rank) for path, factors in sites.items()}
    rank, alpha = _commonest(list(ranks.values()), first.rank), _commonest(list(alphas.values()), first.alpha)
    dropouts = {factors.dropout for factors in sites.values()} or {first.dropout}
    united: dict[str, Any] = {
        name: tuple(dict.fromkeys(one for own in used.values() for one in getattr(own.spec, name)))
        for name in ("modules_to_save", "new_tokens", "trained_tokens")
    }
    united["trained_tokens"] = tuple(one for one in united["trained_tokens"] if one not in united["new_tokens"])
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        targets=tuple(sites) or first.targets,
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        rank_pattern={exactly(path): own for path, own in ranks.items() if own != rank},
        alpha_pattern={exactly(path): own for path, own in alphas.items() if own != alpha},
        **united,
    )


def _commonest(values: list[Any], otherwise: Any) -> Any:
    return max(dict.fromkeys(values), key=values.count) if values else otherwise
