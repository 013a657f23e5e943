"""Whether two ways through one model give the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# How far two correct ways through one model may lie apart, relative to the logits.
_SAME = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}


def agree(got: Sequence[Tensor], want: Sequence[Tensor], slack: float = 1.0) -> bool:
    """Document by document, each `[items, classes]`."""
    limit = slack * _SAME[want[0].dtype]
    pairs = zip(got, want, strict=True)
    return all(g.shape == w.shape and bool((g - w).norm() <= limit * w.norm()) for g, w in pairs)
