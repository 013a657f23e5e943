"""A fresh adapter at one site: from the spec, a generator of its own, and the weight where a start reads it."""

from __future__ import annotations

import torch

from rankwise.adapters.lowrank import LowRank, row_squares
from rankwise.adapters.spec import LoraSpec
from rankwise.adapters.starts import RESIDUAL_STARTS, start, weight_start
from rankwise.surgery.kinds import Layer
from rankwise.surgery.sites import Site


@torch.no_grad()
def begun(spec: LoraSpec, site: Site, generator: torch.Generator) -> LowRank:
    """The factors with which training begins.

    Raises:
        SpecError: the start gives no factors of that rank for such a weight.
    """
    rank, scale = spec.rank_at(site.path), spec.scale_at(site.path)
    layer: Layer = site.module
    weight = site.kind.oriented(layer.weight).detach()
    if spec.init in RESIDUAL_STARTS:
        A, B = weight_start(spec.init, weight, rank, scale, site.path)
    else:
        A, B = start(spec.init, site.shape, rank, generator, lookup=site.kind.lookup)
    magnitudes = row_squares(weight).sqrt().float() if spec.form == "dora" else None
    return LowRank(A, B, scale, spec.dropout, m=magnitudes, residual=spec.init in RESIDUAL_STARTS)
