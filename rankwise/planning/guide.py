"""The practitioners' table for a 7B model, the rule behind each of its figures, and what the rule leaves out."""

from __future__ import annotations

from dataclasses import dataclass

_NOMINAL = 7e9  # what such tables mean by 7B


@dataclass(frozen=True)
class Row:
    """One line: `bytes_a_weight` times the parameters, plus `lump`, gives `told` for 7 × 10⁹ parameters."""

    name: str
    told: float
    bytes_a_weight: float
    lump: float
    rule: str
    wrong: str

    def by_rule(self, parameters: float) -> float:
        return self.bytes_a_weight * parameters + self.lump


GUIDE = (
    Row(
        "full, float32",
        112e9,
        16,
        0,
        "16 bytes a parameter: weight 4, gradient 4, Adam's two moments 8",
        "right for what stays; activations, which grow with the tokens of a batch, and logits are left out",
    ),
    Row(
        "full, float16",
        56e9,
        8,
        0,
        "8 bytes a parameter: all of the above in 16 bits",
        "moments and small updates do not survive 16 bits; with a float32 master, gradients and moments it takes 18 "
        "bytes a parameter, more than float32 alone; activations are left out",
    ),
    Row(
        "LoRA, float16",
        28e9,
        4,
        0,
        "4 bytes a parameter: weight 2, and 2 as if every weight had a gradient",
        "frozen weights have no gradient: weights and adapters take half of it, the rest is whatever the activations "
        "need, which follow from the tokens at once and not from the parameters",
    ),
    Row(
        "QLoRA, 4 bit",
        6e9,
        0.5,
        2.5e9,
        "half a byte a parameter, and 2.5 GB for all else",
        "scales add 3 %, and embeddings and head stay in 16 bits; the lump is right for one small batch alone",
    ),
)


def reproduced() -> dict[str, float]:
    """The table by its rules, in bytes, for 7 × 10⁹ parameters."""
    return {row.name: row.by_rule(_NOMINAL) for row in GUIDE}
