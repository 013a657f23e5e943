"""A fresh adapter at one site: from the spec, a generator of its own, and the weight where a start reads it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankwise.adapters.lowrank import LowRank, row_squares
from rankwise.adapters.spec import DATA_STARTS, LoraSpec
from rankwise.adapters.starts import RESIDUAL_STARTS, WEIGHT_STARTS, remainder_start, start, triplet_start, weight_start
from rankwise.errors import SpecError
from rankwise.surgery.sites import Site, choose_modules, choose_sites


@torch.no_grad()
def begun(spec: LoraSpec, site: Site, generator: torch.Generator) -> LowRank:
    """The factors with which training begins.

    Raises:
        SpecError: the start gives no factors of that rank for such a weight, or needs documents.
    """
    rank, scale = spec.rank_at(site.path), spec.scale_at(site.path)
    if spec.form == "adalora":
        A, B = triplet_start(spec.init, site.shape, rank, generator)
        return LowRank(A, B, scale, spec.dropout, lam=torch.zeros(rank))
    if spec.init in DATA_STARTS:
        raise SpecError(
            f"init {spec.init!r} is found in documents, and a bank knows none",
            hint="rankwise.begin(bank, name, spec, corpus) adds such an adapter",
        )
    if spec.init in WEIGHT_STARTS:
        A, B = weight_start(spec.init, site.kind.weight(site.module), rank, scale, site.path)
    elif spec.init == "loftq":
        A, B = remainder_start(site.kind.remainder(site.module), rank, scale, site.path)
    else:
        A, B = drawn(spec, site, generator)
    return made(spec, site, A, B)


def drawn(spec: LoraSpec, site: Site, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B by chance, one of them zero: gaussian where the spec says so, else kaiming."""
    return start(spec.init, site.shape, spec.rank_at(site.path), generator, lookup=site.kind.lookup)


@torch.no_grad()
def made(spec: LoraSpec, site: Site, A: Tensor, B: Tensor) -> LowRank:
    """Of the A and B that a start gives, a site's factors, with what form and start add to them."""
    scale, residual = spec.scale_at(site.path), spec.init in RESIDUAL_STARTS
    factors = LowRank(A, B, scale, spec.dropout, residual=residual)
    if spec.form != "dora":
        return factors
    weight = site.kind.weight(site.module)
    origin = factors.applied(weight.float()) if spec.init == "loftq" else weight
    return LowRank(A, B, scale, spec.dropout, m=row_squares(origin).sqrt().float(), residual=residual)


def whole_modules(
    spec: LoraSpec, sites: Mapping[str, Site], modules: Mapping[str, nn.Module]
) -> dict[str, dict[str, Tensor]]:
    """What a spec trains whole as it begins: path → parameter name → the base's own tensor.

    Raises:
        TargetError: as `choose_sites` and `choose_modules`.
    """
    chosen = choose_modules(spec.modules_to_save, choose_sites(spec, sites, tuple(modules)), modules)
    return {path: {name: p.detach() for name, p in modules[path].named_parameters()} for path in chosen}
