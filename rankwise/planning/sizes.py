"""The numbers of a config under one set of names, whatever its family calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.errors import ModelError
from rankwise.planning.families import Family

# Our name → what configs call it, the first that is there counts.
_NAMES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
}
_OTHERS: dict[str, tuple[str, ...]] = {
    "vocab": ("vocab_size",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "positions": ("max_position_embeddings", "n_positions"),
    "experts": ("num_local_experts", "num_experts"),
    "chosen": ("num_experts_per_tok",),
    "expert_ffn": ("moe_intermediate_size",),
    "shared_ffn": ("shared_expert_intermediate_size",),
    "decoder_layers": ("num_decoder_layers",),
    "projection": ("word_embed_proj_dim",),
    "type_vocab_size": ("type_vocab_size",),
    "relative_attention_num_buckets": ("relative_attention_num_buckets",),
    "num_channels": ("num_channels",),
    "patch": ("patch_size",),
    "image": ("image_size",),
}
_LARGEST = 2**40  # no size of a model's; keeps sums and products of nonsense small


@dataclass(frozen=True)
class Sizes:
    """Numbers of one model, and the facts that rows of families.py ask for."""

    numbers: Mapping[str, int]
    config: Mapping[str, Any]

    def __getitem__(self, name: str) -> int:
        return self.numbers.get(name, 0)

    def value(self, text: str) -> int:
        """A size as rows write it: `q+2*kv`."""
        return sum(self._product(part) for part in text.split("+"))

    def _product(self, text: str) -> int:
        product = 1
        for factor in text.split("*"):
            product *= int(factor) if factor.isdigit() else self.numbers[factor]
        return product

    def flag(self, name: str) -> bool:
        return name == "yes" or bool(self.config.get(name))

    def holds(self, condition: str, layer: int) -> bool:
        """Whether a row with this condition is there, in this layer."""
        if condition in ("sparse", "dense"):
            return self._is_sparse(layer) == (condition == "sparse")
        facts = {
            "untied": not self.config.get("tie_word_embeddings"),
            "gated": self.gated,
            "ungated": not self.gated,
            "projected": self["projection"] != self["hidden"],
            "norm_before": self.flag("do_layer_norm_before") and not self.flag("_remove_final_layer_norm"),
        }
        return facts[condition]

    @property
    def gated(self) -> bool:
        """Of T5 alone, whose config says it in a word."""
        return str(self.config.get("feed_forward_proj", "")).startswith("gated")

    @property
    def activation(self) -> str:
        names = ("hidden_act", "hidden_activation", "activation_function")
        return next((str(self.config[name]) for name in names if self.config.get(name)), "")

    def _is_sparse(self, layer: int) -> bool:
        if layer in (self.config.get("mlp_only_layers") or ()):
            return False
        return self["experts"] > 0 and (layer + 1) % (self.config.get("decoder_sparse_step") or 1) == 0


def read_sizes(config: Mapping[str, Any], family: Family, where: str) -> Sizes:
    """The sizes that a config describes; what it leaves out comes from the family's defaults.

    Raises:
        ModelError: a size is missing or is no whole number above 0.
    """
    config = {**family.defaults, **{name: value for name, value in config.items() if value is not None}}
    found: dict[str, int] = {}
    problems: list[str] = []
    for ours, theirs in (_NAMES | _OTHERS).items():
        name = next((name for name in theirs if name in config), None)
        if name is None:
            problems += [f"no {' or '.join(theirs)}"] if ours in _NAMES else []
            continue
        value = config[name]
        value = value[0] if isinstance(value, Sequence) and value and not isinstance(value, str) else value
        if type(value) is not int or not 0 < value < _LARGEST:
            problems.append(f"{name} = {config[name]!r}, expected a whole number above 0")
        else:
            found[ours] = value
    if problems:
        raise ModelError(
            f"{where}: its config describes no transformer: {'; '.join(problems)}",
            hint="plan reads the config.json of a transformers model",
        )
    return Sizes(_completed(found), config)


def _completed(found: dict[str, int]) -> dict[str, int]:
    hidden, heads = found["hidden"], found["heads"]
    stands = {
        "ffn": 4 * hidden,
        "kv_heads": heads,
        "head_dim": max(1, hidden // heads),
        "decoder_layers": found["layers"],
        "projection": hidden,
    }
    found = stands | found
    if "experts" in found:
        found = {"expert_ffn": found["ffn"], "shared_ffn": 0, "chosen": 1} | found
    if "patch" in found and "image" in found:
        found["patches"] = (found["image"] // found["patch"]) ** 2
    return found | {"q": heads * found["head_dim"], "kv": found["kv_heads"] * found["head_dim"]}
