"""Files of kohya's sd-scripts, and LyCORIS' LoCon: `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

Format: github.com/kohya-ss/sd-scripts, networks/lora.py.  The dots of a layer's path have become underscores, and which
of them were dots is known from the model, from words of which the paths of UNets and text encoders are made, or from
what was written along here.  A missing or zero alpha is the rank.  DoRA's `dora_scale` means one thing in one tool
and another in the next, and is neither read nor written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rankwise.errors import AdapterFileError, listing
from rankwise.formats.component import the_one, told_component
from rankwise.formats.portable import Outline, Portable, Terms, folded, from_factors, obstacles, paired, refuse
from rankwise.formats.tensors import read_tensors, write_tensors

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lycoris_": "",
}
_PATHS = "rankwise.paths"  # in the metadata: names and the paths that they were
_ENDS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
# Parts of the paths of diffusers' UNets and of transformers' CLIP; a number is one too.
# fmt: off
_WORDS = (
    "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers",
    "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in",
    "proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding",
    "add_embedding", "linear_1", "linear_2",
    "text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2",
    "text_projection",
)
# fmt: on
_PART = re.compile("|".join((*sorted(_WORDS, key=len, reverse=True), r"\d+")))


def read_adapter(path: Path, terms: Terms) -> Portable:
    """The adapter of one model of a pipeline.

    Raises:
        AdapterFileError: the file is damaged, is for several models and none was asked for, has tensors that are no
            plain factors (LoHa, LoKr, Tucker, DoRA), or names of which nobody knows the path; lists them all.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    strangers = []
    for key, tensor in read_tensors(path).items():
        name, _, end = key.partition(".")
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None or end not in _ENDS:
            strangers.append(key)
            continue
        found.setdefault(PREFIXES[prefix], {}).setdefault(name.removeprefix(prefix), {})[_ENDS[end]] = tensor
    if strangers:
        raise AdapterFileError(
            f"{path}: {len(strangers)} tensors are not plain factors of a layer:\n{listing(strangers)}",
            hint="LoHa, LoKr, Tucker factors and dora_scale have no place in a LoRA; train or export it as plain LoRA",
        )
    component = the_one(path, found, terms.component)
    own = found[component]
    paths = _paths(path, own, terms.outline)
    alphas = {name: float(parts.pop("alpha", torch.zeros(()))) for name, parts in own.items()}
    scales = {paths[n]: alphas[n] / len(own[n]["A"]) if alphas[n] and "A" in own[n] else 1.0 for n in own}
    sites = paired(path, {paths[name]: parts for name, parts in own.items()}, scales)
    return Portable(from_factors(sites), component=component).known_on(terms.outline)


def _paths(path: Path, names: Iterable[str], outline: Outline | None) -> dict[str, str]:
    """The path of every name.

    Raises:
        AdapterFileError: lists every name that could be none, or several.
    """
    with safe_open(path, framework="pt") as file:
        kept = (file.metadata() or {}).get(_PATHS, "{}")
    known = {} if outline is not None else json.loads(kept)
    candidates: dict[str, list[str]] = {}
    for layer in outline.layers if outline is not None else ():
        candidates.setdefault(layer.replace(".", "_"), []).append(layer)
    found, problems = {}, []
    for name in names:
        own = candidates.get(name, []) if outline is not None else [p for p in (known.get(name), _spelt(name)) if p]
        if own and (outline is None or len(own) == 1):
            found[name] = own[0]
        else:
            problems.append(f"{name}: {'could be ' + ' or '.join(own) if own else 'no known layer'}")
    if problems:
        hint = "say of which model: --model PATH, a pipeline's folder or one of its models"
        if any(name.startswith(("input_blocks", "output_blocks", "middle_block")) for name in names):
            hint = "these are the names of the original UNet: load it in diffusers, and convert what that saves"
        raise AdapterFileError(
            f"{path}: the paths of {len(problems)} layers are not known:\n{listing(problems)}", hint=hint
        )
    return found


def _spelt(name: str) -> str | None:
    """The path that a name is in words that are known, the longest first; None where one is not."""
    parts, at = [], 0
    while at < len(name):
        match = _PART.match(name, at)
        if match is None or name[match.end() : match.end() + 1] not in ("_", ""):
            return None
        parts.append(match[0])
        at = match.end() + 1
    return ".".join(parts)


def write_adapter(path: Path, portable: Portable, terms: Terms) -> None:
    """Writes what kohya's scripts, and most programs that make pictures, take.

    Raises:
        AdapterFileError: lists everything that the format cannot hold; nobody has said for which model it is.
    """
    sites = portable.adapter.sites
    component = told_component(sites, portable.component, terms.component, "kohya's format")
    prefix = next((prefix for prefix, own in PREFIXES.items() if own == component), None)
    problems = obstacles(portable, dora=False, convolutions=True, lookups=False)
    if prefix is None:
        problems.append(f"{component}: its layers have other names there than in diffusers")
    names = {layer: f"{prefix}{layer.replace('.', '_')}" for layer in sites}
    problems += [f"{layer}: its name {n} is another layer's too" for layer, n in names.items() if _twice(n, names)]
    refuse("kohya's format", problems)
    # One for all: where alphas differ, diffusers takes the commonest for most layers of attention.
    alpha = Counter(factors.scale * factors.rank for factors in sites.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for layer, factors in sites.items():
        own = folded(factors, alpha / factors.rank)
        tensors[f"{names[layer]}.lora_down.weight"] = own.A.detach().to(terms.dtype)
        tensors[f"{names[layer]}.lora_up.weight"] = own.B.detach().to(terms.dtype)
        tensors[f"{names[layer]}.alpha"] = torch.tensor(alpha)  # in float32 whatever the rest
    paths = {name.removeprefix(str(prefix)): layer for layer, name in names.items()}
    write_tensors(path, tensors, _metadata({factors.rank for factors in sites.values()}, alpha, paths))


def _twice(name: str, names: dict[str, str]) -> bool:
    return list(names.values()).count(name) > 1


def _metadata(ranks: set[int], alpha: float, paths: dict[str, str]) -> dict[str, str]:
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",  # kohya's word where layers differ
        "ss_network_alpha": f"{alpha:.9g}",
        _PATHS: json.dumps(paths),
    }
