"""The factor s in W + s·B·A, from alpha and the rank of the site.  Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

Scaling = Literal["alpha/r", "alpha/sqrt(r)", "alpha"]

_RULES: dict[Scaling, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, rank: alpha / rank,  # LoRA, arXiv:2106.09685 §4.1
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),  # rsLoRA, arXiv:2312.03732 theorem 3.2
    "alpha": lambda alpha, rank: alpha,  # direct, as in mlx-lm
}
assert set(_RULES) == set(get_args(Scaling))


def effective_scale(rule: Scaling, alpha: float, rank: int) -> float:
    """S for one site.

    >>> [effective_scale(rule, 32, 16) for rule in ("alpha/r", "alpha/sqrt(r)", "alpha")]
    [2.0, 8.0, 32]
    """
    return _RULES[rule](alpha, rank)


def alpha_for(rule: Scaling, alpha: float, rank: int, other: int) -> float:
    """The alpha with which rank `other` has the factor that `rank` has with `alpha`.

    >>> [alpha_for(rule, 32, 16, 4) for rule in ("alpha/r", "alpha/sqrt(r)", "alpha")]
    [8.0, 16.0, 32.0]
    """
    return alpha_of(rule, effective_scale(rule, alpha, rank), other)


def alpha_of(rule: Scaling, scale: float, rank: int) -> float:
    """The alpha with which a rank has a factor; rank 0, which has none, is taken as 1.

    >>> [alpha_of(rule, 2, 16) for rule in ("alpha/r", "alpha/sqrt(r)", "alpha")]
    [32.0, 8.0, 2.0]
    """
    return float(f"{scale / effective_scale(rule, 1, max(rank, 1)):.14g}")  # 32 / 6 * 6 is 32
