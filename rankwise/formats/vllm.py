"""What vLLM serves of PEFT's format: what it refuses, and the same adapter in the parts that every version takes alike.

Source: github.com/vllm-project/vllm, vllm/lora/peft_helper.py and lora_model.py, and the choices of `max_lora_rank` in
vllm/config/lora.py.  Scales are put into B and alphas made equal to ranks, because versions differ in whether they heed
`alpha_pattern` and `rank_pattern`: a global alpha/r of 1 is right in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank
from rankwise.formats.portable import Portable, folded, from_factors, refuse

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SERVED_WHOLE = ("classifier", "score")


def check_served(portable: Portable) -> None:
    """Everything of an adapter that vLLM refuses, at once; of form dora only what is left when it is plain.

    Raises:
        AdapterFileError: there is something.
    """
    adapter = portable.adapter
    problems = [f"{path}: a convolution" for path, own in adapter.sites.items() if own.shape.kernel]
    problems += [
        f"{path}: a layer trained whole, of which only {' and '.join(_SERVED_WHOLE)} are served"
        for path in adapter.modules
        if path.rsplit(".", 1)[-1] not in _SERVED_WHOLE
    ]
    problems += [f"{path}: rows of {len(rows.tokens)} tokens" for path, rows in adapter.tokens.items()]
    problems += [
        f"{path}: rank {own.rank}, more than {MAX_LORA_RANKS[-1]} (rankwise compress makes it smaller)"
        for path, own in adapter.sites.items()
        if own.rank > MAX_LORA_RANKS[-1]
    ]
    refuse("vLLM", problems, "merge it into its base (rankwise merge) and serve the merged model")


def max_lora_rank(ranks: Mapping[str, int]) -> int:
    """The smallest `--max-lora-rank` that takes every layer."""
    most = max(ranks.values(), default=1)
    return next(rank for rank in MAX_LORA_RANKS if rank >= most)


def served(portable: Portable) -> Portable:
    """The same in A and B with an alpha that is the rank everywhere."""
    sites = {path: folded(factors) for path, factors in portable.adapter.sites.items()}
    spec = from_factors(sites, portable.adapter.modules).spec
    return replace(portable, adapter=replace(portable.adapter, spec=spec, sites=sites, expects={}))


@dataclass(frozen=True)
class Plain:
    """A DoRA adapter as plain LoRA, and how far from it that is.

    Attributes:
        portable: of the rank that was asked for.
        errors: rank → ‖ΔW - B·A‖ / ‖ΔW‖ over all layers, for the ranks that vLLM has.
        error: at the rank of `portable`.
    """

    portable: Portable
    errors: Mapping[int, float]
    error: float


@torch.no_grad()
def plain(portable: Portable, weight: Callable[[str], Tensor], rank: int, advance: Callable[[float], None]) -> Plain:
    """Takes the whole change of form dora, m ∘ V/‖V‖ - W, apart by its singular values and keeps the largest.

    Args:
        weight: of the base by path, `[O, I]`.
        rank: of every layer that was DoRA.
    """
    sites = dict(portable.adapter.sites)
    left = dict.fromkeys((*MAX_LORA_RANKS, rank), 0.0)
    whole = 0.0
    for done, (path, factors) in enumerate(portable.adapter.sites.items()):
        if factors.m is not None:
            W = weight(path).double()
            U, values, Vh = torch.linalg.svd(factors.double().applied(W) - W, full_matrices=False)
            factors.float()
            roots = values[:rank].sqrt()
            sites[path] = LowRank((roots[:, None] * Vh[:rank]).float(), (U[:, :rank] * roots).float(), 1.0)
            whole += float(values.square().sum())
            for kept in left:
                left[kept] += float(values[kept:].square().sum())
        advance((done + 1) / len(sites))
    errors = {kept: math.sqrt(missed / whole) if whole else 0.0 for kept, missed in left.items()}
    adapter = replace(portable.adapter, sites=sites, spec=from_factors(sites, portable.adapter.modules).spec)
    return Plain(replace(portable, adapter=adapter), {k: errors[k] for k in MAX_LORA_RANKS}, errors[rank])
