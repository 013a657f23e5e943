"""Starting values of A and B.  One of the two is zero, so that training starts at the base, to the bit.

Kaiming: A uniform within ±1/√fan_in, as loralib (`kaiming_uniform_` with a = √5).  Gaussian: A normal with deviation
1/r, as PEFT.  Embeddings turn it round, as loralib does: a word's row of A is looked up, so A starts at zero and B is
standard normal, under either name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.adapters.lowrank import SiteShape


def start(
    init: str, shape: SiteShape, rank: int, generator: torch.Generator, *, lookup: bool = False
) -> tuple[Tensor, Tensor]:
    """A and B, float32 in main memory, drawn from `generator` alone; `lookup` for embeddings."""
    shape_A, shape_B = shape.factor_shapes(rank)
    if lookup:
        return torch.zeros(shape_A), torch.randn(shape_B, generator=generator)
    if init == "gaussian":
        A = torch.randn(shape_A, generator=generator) / rank
    else:
        bound = 1 / math.sqrt(torch.Size(shape_A[1:]).numel())
        A = torch.empty(shape_A).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(shape_B)
