"""What a layer does in its block, told by its path alone: no module is there to be asked."""

from __future__ import annotations

import re

from rankwise.adapters.presets import Role

HEADS = ("lm_head", "classifier", "score", "qa_outputs")

# What the last part of a path says about a linear layer inside an attention block: as in surgery/sites.py, which
# needs torch; tests/planning/test_roles.py holds the two to the same answers on every architecture in tests/models.py.
_ATTENTION_NAMES: dict[Role, str] = {
    "query": r"(to_)?w?q(_proj|_lin|uery|_[ab]_proj)?|query(_proj|_layer)?",
    "key": r"(to_)?w?k(_proj|_lin)?|key(_proj|_layer)?",
    "value": r"(to_)?w?v(_proj|_lin)?|value(_proj|_layer)?",
    "qkv": r"c_attn|w?qkv(_proj)?|query_key_value|in_proj|att_proj|kv_[ab]_proj(_with_mqa)?",
}


def linear_role(path: str) -> Role:
    """The role of a linear layer at `path`."""
    *parents, leaf = path.split(".")
    if leaf in HEADS:
        return "head"
    if any(re.search(r"attn|attention", part, re.I) for part in parents):
        return next((role for role, names in _ATTENTION_NAMES.items() if re.fullmatch(names, leaf, re.I)), "attention")
    return "mlp" if any(part.isdigit() for part in parents) else "other"
