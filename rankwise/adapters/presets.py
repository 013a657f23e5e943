"""Named choices: which layers a word like `attention` means, and the guides' scenarios with the reason for each.

Torch-free.  A role is what a layer does in its block; surgery finds the roles in a model (`surgery/sites.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["query", "key", "value", "qkv", "attention", "mlp", "head", "embedding", "convolution", "other"]
TargetPreset = Literal["minimal", "attention", "mlp", "all-linear"]

TARGET_ROLES: dict[str, frozenset[Role]] = {
    "minimal": frozenset({"query", "value", "qkv"}),
    "attention": frozenset({"query", "key", "value", "qkv", "attention"}),
    "mlp": frozenset({"mlp"}),
    "all-linear": frozenset({"query", "key", "value", "qkv", "attention", "mlp", "other"}),
}
assert set(TARGET_ROLES) == set(get_args(TargetPreset))


@dataclass(frozen=True)
class Scenario:
    """A starting point from the practitioners' guides."""

    rank: int
    alpha: float
    targets: TargetPreset
    reason: str


SCENARIOS: dict[str, Scenario] = {
    "quick": Scenario(8, 16, "minimal", "a first look: few parameters, q and v only, alpha = 2r"),
    "general": Scenario(16, 32, "attention", "the guides' default for one task: all of attention, alpha = 2r"),
    "complex": Scenario(32, 64, "all-linear", "far domains and instruction tuning: every linear layer, alpha = 2r"),
    "limited": Scenario(4, 8, "minimal", "least memory: rank 4 on q and v, alpha = 2r"),
}
