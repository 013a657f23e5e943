"""The file of a diffusion pipeline, pytorch_lora_weights.safetensors: read in every spelling, written in today's.

Format: github.com/huggingface/diffusers, loaders/lora_base.py and utils/state_dict_utils.py.  Keys begin with the model
of the pipeline, `unet.…lora_A.weight`.  Scales are written into B: without alphas and metadata every version takes B·A
as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from rankwise.adapters.spec import LoraSpec
from rankwise.errors import AdapterFileError, SpecError, listing
from rankwise.formats.component import split, the_one, told_component
from rankwise.formats.portable import Portable, Terms, folded, from_factors, obstacles, paired, refuse
from rankwise.formats.tensors import read_tensors, write_tensors

FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_FACTOR = re.compile(
    r"(?P<path>.+?)(?P<processor>_lora)?\."
    r"(?:lora_(?P<letter>[AB])|lora\.(?P<way>down|up)|lora_linear_layer\.(?P<long>down|up)|(?P<bare>down|up))\.weight"
)
_MAGNITUDES = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(\.weight)?")
# What an old file calls the layers of an attention processor.
_PROCESSOR = {
    "unet": {"to_out": "to_out.0"},
    "text": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}


def read_adapter(path: Path, terms: Terms) -> Portable:
    """The adapter of one model of a pipeline.

    Raises:
        AdapterFileError: the file is damaged, is for several models and none was asked for, or has tensors that are no
            factors; lists them all.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    alphas: dict[tuple[str, str], float] = {}
    strangers = []
    for key, tensor in read_tensors(path).items():
        component, name = split(key)
        place = _place(name, component)
        if place is not None:
            found.setdefault(component, {}).setdefault(place[0], {})[place[1]] = tensor
        elif name.endswith(".alpha") and tensor.numel() == 1:
            alphas[component, name.removesuffix(".alpha")] = float(tensor)
        else:
            strangers.append(key)
    if strangers:
        raise AdapterFileError(f"{path}: {len(strangers)} tensors are no factors of a layer:\n{listing(strangers)}")
    component = the_one(path, found, terms.component)
    own = found[component]
    said = _said(path, component)
    scales = {}
    for name, parts in own.items():
        rank = len(parts["A"]) if "A" in parts else 1
        alpha = alphas.get((component, name))
        scales[name] = alpha / rank if alpha else said.scale_at(name) if said is not None else 1.0
    sites = paired(path, own, scales)
    wrong = [
        f"{name}: rank {factors.rank}, {said.rank_at(name)} by its metadata"
        for name, factors in sites.items()
        if said is not None and said.rank_at(name) != factors.rank
    ]
    if wrong:
        raise AdapterFileError(f"{path}: tensors and metadata disagree:\n{listing(wrong)}")
    return Portable(from_factors(sites), component=component).known_on(terms.outline)


def _place(name: str, component: str) -> tuple[str, str] | None:
    """The layer that a key belongs to, and which part of it: `A`, `B` or `m`."""
    name = name.replace(".processor.", ".")
    magnitudes = _MAGNITUDES.fullmatch(name)
    if magnitudes:
        return magnitudes["path"], "m"
    match = _FACTOR.fullmatch(name)
    if match is None or (match["bare"] and not match["processor"]):
        return None
    path = match["path"]
    if match["processor"]:
        parents, _, last = path.rpartition(".")
        path = f"{parents}.{_PROCESSOR['text' if component.startswith('text') else 'unet'].get(last, last)}"
    way = match["way"] or match["long"] or match["bare"]
    return path, match["letter"] or {"down": "A", "up": "B"}[str(way)]


def _said(path: Path, component: str) -> LoraSpec | None:
    """What the file's metadata says of ranks and alphas; None where there are none."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if _METADATA not in metadata:
        return None
    try:
        whole: Mapping[str, Any] = json.loads(metadata[_METADATA])
        begin = f"{component}." if component else ""
        own = {key.removeprefix(begin): value for key, value in whole.items() if key.startswith(begin)}
        if "r" not in own:
            return None
        return LoraSpec(
            rank=own["r"],
            alpha=own.get("lora_alpha", own["r"]),
            scaling="alpha/sqrt(r)" if own.get("use_rslora") else "alpha/r",
            rank_pattern=own.get("rank_pattern") or {},
            alpha_pattern=own.get("alpha_pattern") or {},
        )
    except (ValueError, TypeError, AttributeError, ValidationError, SpecError) as error:
        raise AdapterFileError(f"{path}: its metadata {_METADATA} cannot be read: {error}") from None


def write_adapter(path: Path, portable: Portable, terms: Terms) -> None:
    """Writes what `pipeline.load_lora_weights` takes.

    Raises:
        AdapterFileError: lists everything that the format cannot hold; nobody has said for which model it is.
    """
    refuse("diffusers' format", obstacles(portable, dora=True, convolutions=True, lookups=False))
    sites = portable.adapter.sites
    component = told_component(sites, portable.component, terms.component, "diffusers' format")
    tensors: dict[str, Tensor] = {}
    for name, factors in sites.items():
        own, stem = folded(factors), f"{component}.{name}"
        tensors |= {f"{stem}.lora_A.weight": own.A.detach(), f"{stem}.lora_B.weight": own.B.detach()}
        if own.m is not None:  # as PEFT has it: in the shape of a convolution's output
            kernel = own.shape.kernel
            m = own.m.detach()
            tensors[f"{stem}.lora_magnitude_vector"] = m.view(1, -1, *(1 for _ in kernel)) if kernel else m
    tensors = {name: tensor.to(terms.dtype) for name, tensor in tensors.items()}
    write_tensors(path, tensors, {"format": "pt"})
