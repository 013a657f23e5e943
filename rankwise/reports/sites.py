"""The adapted layers in as few lines as say it all: same rank, alpha and scale, over ranges of layers and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from rankwise.reports.numbers import ranges
from rankwise.reports.run import Site

# One place in a path and the values it takes in the group: ("layers",) or ("0", "1", "2").
Part = tuple[str, ...]


@dataclass(frozen=True)
class SiteGroup:
    """`model.layers.0–29.self_attn` × (`q_proj`, `v_proj`): every product of the ranges is a site, and no other."""

    where: str
    names: tuple[str, ...]
    sites: int
    rank: int
    alpha: float
    scale: float


Group = tuple[Site, tuple[Part, ...]]


def group_sites(sites: Mapping[str, Site]) -> tuple[SiteGroup, ...]:
    """Groups in the order in which their first site appears."""
    groups: list[Group] = [(site, tuple((part,) for part in path.split("."))) for path, site in sites.items()]
    places = range(max((len(parts) for _, parts in groups), default=0))
    for place in places:
        groups = _joined(groups, place, lambda parts, place: _numbered(parts[place]))
    for place in places:
        groups = _joined(groups, place, lambda parts, place: place == len(parts) - 1)
    return tuple(_group(site, parts) for site, parts in groups)


def _joined(groups: list[Group], place: int, may_join: Callable[[tuple[Part, ...], int], bool]) -> list[Group]:
    """Joins the groups that differ at one place only, where they may."""
    joined: dict[object, Group] = {}
    for site, parts in groups:
        if place >= len(parts) or not may_join(parts, place):
            joined[site, parts] = (site, parts)
            continue
        before, after = parts[:place], parts[place + 1 :]
        _, known = joined.get((site, before, after), (site, (*before, (), *after)))
        joined[site, before, after] = (site, (*before, known[place] + parts[place], *after))
    return list(joined.values())


def _group(site: Site, parts: tuple[Part, ...]) -> SiteGroup:
    *path, last = parts
    return SiteGroup(
        where=".".join(_written(part) for part in path),
        names=last,
        sites=prod(len(part) for part in parts),
        rank=site.rank,
        alpha=site.alpha,
        scale=site.scale,
    )


def _numbered(part: Part) -> bool:
    return all(value.isdecimal() for value in part)


def _written(part: Part) -> str:
    if not _numbered(part):
        return part[0]
    written = ranges(map(int, part))
    return f"{{{written}}}" if "," in written else written
