"""Named choices: which layers a word like `attention` means, and the guides' scenarios with the reason for each.

Torch-free.  A role is what a layer does in its block: surgery tells it from the model (`surgery/sites.py`),
planning from names alone.
"""

from __future__ import annotations

import re
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


# What the last part of a path says about a linear layer inside an attention block, over the families in use.
_ATTENTION_NAMES: dict[Role, str] = {
    "query": r"(to_)?w?q(_proj|_lin|uery|_[ab]_proj)?|query(_proj|_layer)?",
    "key": r"(to_)?w?k(_proj|_lin)?|key(_proj|_layer)?",
    "value": r"(to_)?w?v(_proj|_lin)?|value(_proj|_layer)?",
    "qkv": r"c_attn|w?qkv(_proj)?|query_key_value|in_proj|att_proj|kv_[ab]_proj(_with_mqa)?",
}


# What models call the layers, or the top-level modules, that make logits of hidden states.
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "classification_head")


def linear_role(path: str, in_attention: bool) -> Role:
    """The role of a linear layer at `path`, in an attention block or not."""
    *parents, leaf = path.split(".")
    if any(part in _HEADS for part in (*parents[:1], leaf)):
        return "head"
    if in_attention:
        return next((role for role, names in _ATTENTION_NAMES.items() if re.fullmatch(names, leaf, re.I)), "attention")
    return "mlp" if any(part.isdigit() for part in parents) else "other"


def calls_itself_attention(part: str) -> bool:
    """Of one part of a path: `attn`, `self_attn`, `attention`, …"""
    return re.search(r"attn|attention", part, re.I) is not None


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
