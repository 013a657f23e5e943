"""Which layers `targets`, `exclude` and `layers` of a spec mean, told from names and roles alone.  Torch-free.

One rule for all who choose: surgery in a model, planning in shapes.  `targets` choose, `exclude` takes out of what they
chose, `layers` keeps what stands in these blocks.  A layer that `targets` name by its whole path is named for itself,
and kept wherever it stands; so does PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from rankwise.adapters.blocks import block_of, holds, lacking
from rankwise.adapters.presets import TARGET_ROLES, Role
from rankwise.adapters.spec import LoraSpec, Targets, matching_pattern
from rankwise.errors import TargetError, listing, nearest


@dataclass(frozen=True)
class Place:
    """One layer that can be adapted, as a choice sees it: every path it has in the model, and its role."""

    paths: tuple[str, ...]
    role: Role


Places = Mapping[str, Place]


def choose(spec: LoraSpec, places: Places, modules: Collection[str]) -> list[str]:
    """The keys of the places that a spec means, in their order; `modules` are all module paths, for the error message.

    Raises:
        TargetError: lists every name, pattern and block number that matches nothing, and what there is; or nothing is
            left.
    """
    problems: list[str] = []
    targeted = _meant("targets", spec.targets, places, modules, problems)
    if isinstance(spec.targets, str) and spec.targets in TARGET_ROLES:  # a word means no layer that is trained whole
        found, targeted = targeted, {key for key in targeted if not _is_whole(spec, places[key])}
        if found and not targeted:
            problems.append(f"targets {spec.targets!r} match no layer but those that are trained whole")
    excluded = _meant("exclude", spec.exclude, places, modules, problems) if spec.exclude else set()
    there = {number for key in targeted for path in places[key].paths if (number := block_of(path)) is not None}
    if absent := lacking(spec.layers, there):
        problems.append(f"layers {absent}: none of the targeted layers stands there{_numbered(there)}")
    chosen = [key for key in places if key in targeted - excluded and _kept(spec, places[key])]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, float] = getattr(spec, field)
        used = {matching_pattern(patterns, key) for key in chosen}
        problems += [f"{field} {key!r} matches none of the targeted layers" for key in patterns if key not in used]
    if not chosen and not problems:
        problems.append("exclude and layers leave none of the targeted layers")
    if problems:
        raise TargetError(f"the spec does not fit the model:\n{listing(problems)}", hint=_what_there_is(places))
    return chosen


def is_called(name: str, paths: Iterable[str]) -> bool:
    """Whether a name is one of the paths, or the last parts of one."""
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _is_whole(spec: LoraSpec, place: Place) -> bool:
    """Whether the spec names the layer, or something it is inside of, to be trained whole."""
    holders = [part for path in place.paths for part in accumulate(path.split("."), "{}.{}".format)]
    return any(is_called(name, holders) for name in spec.modules_to_save)


def _kept(spec: LoraSpec, place: Place) -> bool:
    return any(is_within(spec, path) for path in place.paths)


def is_within(spec: LoraSpec, path: str) -> bool:
    """Whether a targeted layer stands where `layers` says, or is named by its whole path."""
    return holds(spec.layers, path) or (not isinstance(spec.targets, str) and path in spec.targets)


def _meant(field: str, asked: Targets, places: Places, modules: Collection[str], problems: list[str]) -> set[str]:
    """The places that a preset, a regular expression or names mean; what means none goes to `problems`."""
    if isinstance(asked, str):
        found = _by_preset(asked, places) or _by_regex(asked, places)
        if not found:
            problems.append(f"{field} {asked!r} match no layer{_holder(asked, modules)}")
        return found
    found = set()
    for name in asked:
        named = {key for key, place in places.items() if is_called(name, place.paths)}
        found |= named
        if not named:
            problems.append(("" if field == "targets" else f"{field} ") + _unmatched(name, places, modules))
    return found


def _by_preset(word: str, places: Places) -> set[str]:
    roles = TARGET_ROLES.get(word, frozenset())
    return {key for key, place in places.items() if place.role in roles}


def _by_regex(pattern: str, places: Places) -> set[str]:
    matches = re.compile(pattern).fullmatch
    return {key for key, place in places.items() if any(map(matches, place.paths))}


def _holder(pattern: str, modules: Collection[str]) -> str:
    """A way out for a pattern that means a block or a whole stack: the layers in it have longer paths."""
    if pattern in TARGET_ROLES or not any(map(re.compile(pattern).fullmatch, modules)):
        return ""
    return rf"; it means modules that hold layers, which {pattern}\..* means"


def _unmatched(name: str, places: Places, modules: Collection[str]) -> str:
    within = [path for path in modules if is_called(name, [path])]
    if any(path.startswith(f"{holder}.") for holder in within for place in places.values() for path in place.paths):
        pattern = rf"(.*\.)?{re.escape(name)}\..*"
        return f"{name!r} is a module that cannot be adapted; the layers inside it are the regular expression {pattern}"
    if within:
        return f"{name!r} is a module that cannot be adapted (only linear, Conv1D, ungrouped convolution and embedding)"
    return f"{name!r} matches no layer{nearest(name, sorted(_leaves(places)))}"


def _numbered(there: Collection[int]) -> str:
    return f", only in blocks {min(there)} to {max(there)}" if there else ", which are in no blocks"


def _leaves(places: Places) -> set[str]:
    return {key.rsplit(".", 1)[-1] for key in places}


def _what_there_is(places: Places) -> str:
    if not places:
        return "the model has no layer that can be adapted"
    return f"layers here: {', '.join(sorted(_leaves(places)))}; presets: {', '.join(TARGET_ROLES)}"
