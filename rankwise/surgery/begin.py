"""A fresh adapter at one site: from the spec, a generator of its own, and the weight where a start reads it."""

from __future__ import annotations

import torch

from rankwise.adapters.lowrank import LowRank, row_squares
from rankwise.adapters.spec import LoraSpec
from rankwise.adapters.starts import RESIDUAL_STARTS, remainder_start, start, triplet_start, weight_start
from rankwise.surgery.sites import Site


@torch.no_grad()
def begun(spec: LoraSpec, site: Site, generator: torch.Generator) -> LowRank:
    """The factors with which training begins.

    Raises:
        SpecError: the start gives no factors of that rank for such a weight.
    """
    rank, scale = spec.rank_at(site.path), spec.scale_at(site.path)
    if spec.form == "adalora":
        A, B = triplet_start(spec.init, site.shape, rank, generator)
        return LowRank(A, B, scale, spec.dropout, lam=torch.zeros(rank))
    residual = spec.init in RESIDUAL_STARTS
    if residual:
        A, B = weight_start(spec.init, site.kind.weight(site.module), rank, scale, site.path)
    elif spec.init == "loftq":
        A, B = remainder_start(site.kind.remainder(site.module), rank, scale, site.path)
    else:
        A, B = start(spec.init, site.shape, rank, generator, lookup=site.kind.lookup)
    factors = LowRank(A, B, scale, spec.dropout, residual=residual)
    if spec.form != "dora":
        return factors
    weight = site.kind.weight(site.module)
    origin = factors.applied(weight.float()) if spec.init == "loftq" else weight
    return LowRank(A, B, scale, spec.dropout, m=row_squares(origin).sqrt().float(), residual=residual)
