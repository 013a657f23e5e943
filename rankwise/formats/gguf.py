"""llama.cpp's adapter: one GGUF file, `<tensor>.lora_a` and `<tensor>.lora_b`, read and written.

Format: github.com/ggml-org/llama.cpp, gguf-py and src/llama-adapter.cpp.  A file has one alpha for all its layers,
which are therefore written with the factor s inside B and without any alpha: llama.cpp then takes B·A as it is.  Layers
are called as llama.cpp calls the tensors of the model, and where it stores the rows of Q and K in another order, B has
them in that order too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank
from rankwise.errors import AdapterFileError, MissingPackageError, ModelError, listing
from rankwise.formats.portable import Outline, Portable, Terms, folded, from_factors, obstacles, paired, refuse
from rankwise.formats.tensors import settle

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class _Family:
    """How llama.cpp calls a family, and whether it stores Q and K with the two halves of each head interleaved."""

    architecture: str
    interleaved: bool = False


# By `model_type`.  Families whose tensors llama.cpp cuts or joins otherwise are not here.
_FAMILIES = {
    "llama": _Family("llama", interleaved=True),
    "mistral": _Family("llama", interleaved=True),
    "mixtral": _Family("llama", interleaved=True),
    "olmo": _Family("olmo", interleaved=True),
    "granite": _Family("granite", interleaved=True),
    "olmo2": _Family("olmo2"),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
    "gemma": _Family("gemma"),
    "gemma2": _Family("gemma2"),
    "gemma3_text": _Family("gemma3"),
    "phi3": _Family("phi3"),
    "gpt2": _Family("gpt2"),
}


def read_adapter(path: Path, terms: Terms) -> Portable:
    """An adapter from llama.cpp's file; `terms` has the outline of its model.

    Raises:
        AdapterFileError: it is no adapter, or of another architecture; lists tensors that belong to no layer.
        ModelError: the model is of a family that is not known here.
    """
    outline, package = _of(terms), _package()
    family = _family(outline)
    try:
        reader = package.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise AdapterFileError(f"{path}: not a whole GGUF file: {error}", hint="copy or download it again") from None
    said = {name: field.contents() for name, field in reader.fields.items()}
    _check_kind(path, said, family)
    names = {name: layer for layer, name in _names(outline, family).items() if name is not None}
    found: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for entry in reader.tensors:
        name, _, end = entry.name.rpartition(".")
        if end not in ("lora_a", "lora_b") or name not in names:
            strangers.append(entry.name)
            continue
        values = package.quants.dequantize(entry.data, entry.tensor_type)
        tensor = torch.from_numpy(np.array(values, dtype=np.float32).reshape(tuple(reversed(entry.shape.tolist()))))
        found.setdefault(names[name], {})["A" if end == "lora_a" else "B"] = _turned(tensor, name, end)
    if strangers:
        raise AdapterFileError(
            f"{path}: {len(strangers)} tensors belong to no layer of {outline.name}:\n{listing(strangers)}",
            hint="is it an adapter of another model?",
        )
    alpha = float(said.get(package.Keys.Adapter.LORA_ALPHA, 0.0))
    scales = {layer: alpha / len(parts["A"]) if alpha and "A" in parts else 1.0 for layer, parts in found.items()}
    sites = paired(path, found, scales)
    sites = {layer: _with_rows(own, _order(layer, outline, family, back=True)) for layer, own in sites.items()}
    return Portable(from_factors(sites)).known_on(outline)


def write_adapter(path: Path, portable: Portable, terms: Terms) -> None:
    """Writes what `llama-cli --lora` takes; `terms` has the outline of its model.

    Raises:
        AdapterFileError: lists everything that the format cannot hold, or what is not finite in the number format.
        ModelError: the model is of a family that is not known here.
    """
    outline = _of(terms)
    family = _family(outline)
    names = _names(outline, family)
    problems = obstacles(portable, dora=False, convolutions=False, lookups=True)
    for layer in portable.adapter.sites:
        name = names.get(layer)
        if name is None:
            problems.append(f"{layer}: llama.cpp has no tensor of its own for it")
        elif outline.tied and name in (_EMBEDDING, _HEAD):
            problems.append(f"{layer}: embedding and head are one tensor in llama.cpp, which would change both")
    refuse("llama.cpp's format", problems)
    tensors: dict[str, Tensor] = {}
    for layer, factors in portable.adapter.sites.items():
        name = names[layer]
        own = _with_rows(folded(factors), _order(layer, outline, family))
        for end, tensor in (("lora_a", own.A.detach()), ("lora_b", own.B.detach())):
            tensors[f"{name}.{end}"] = _turned(tensor, str(name), end)
    _write(path, family.architecture, tensors, terms.dtype)


def _write(path: Path, architecture: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """As `formats/tensors.py`: the old file or the whole new one, which is read back."""
    package = _package()
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.to(dtype)).all()]
    if broken:
        raise AdapterFileError(f"{path}: not finite as {dtype}:\n{listing(broken)}", hint="--dtype f32 holds them")
    quantised = package.GGMLQuantizationType
    kind = {torch.float32: quantised.F32, torch.float16: quantised.F16, torch.bfloat16: quantised.BF16}[dtype]
    beside = path.with_name(f".{path.name}.part")
    writer = package.GGUFWriter(beside, architecture)
    writer.add_type(package.GGUFType.ADAPTER)
    writer.add_string(package.Keys.Adapter.TYPE, "lora")
    written = {name: _bits(tensor.to(dtype)) for name, tensor in tensors.items()}
    for name, values in written.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = {entry.name: entry.data for entry in package.GGUFReader(beside).tensors}
    wrong = [name for name in written.keys() | back.keys() if not _same(written.get(name), back.get(name))]
    if wrong:
        raise AdapterFileError(f"{path}: read back differs from what was written:\n{listing(sorted(wrong))}")
    settle(beside, path)


def _bits(tensor: Tensor) -> Any:
    """A numpy array; bfloat16, which numpy does not know, as its bytes."""
    own = tensor.contiguous()
    return own.view(torch.uint8).numpy() if own.dtype == torch.bfloat16 else own.numpy()


def _same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and a.tobytes() == b.tobytes()


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingPackageError(
            "GGUF files are read and written by the package gguf", hint="pip install 'rankwise[convert]'"
        ) from None
    return gguf


def _of(terms: Terms) -> Outline:
    if terms.outline is None:
        raise ModelError("llama.cpp's names of layers depend on the model", hint="say which: --model PATH_OR_ID")
    return terms.outline


def _family(outline: Outline) -> _Family:
    family = _FAMILIES.get(outline.family)
    if family is None:
        raise ModelError(
            f"{outline.name}: how llama.cpp stores the family {outline.family!r} is not known here",
            hint=f"known: {', '.join(_FAMILIES)}; or merge the adapter and convert the merged model",
        )
    return family


def _check_kind(path: Path, said: Mapping[str, Any], family: _Family) -> None:
    """That it is a LoRA adapter of this architecture, and nothing that would be lost."""
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": family.architecture}
    problems = [
        f"{key} is {said.get(key)!r}, expected {value!r}" for key, value in wanted.items() if said.get(key) != value
    ]
    if "adapter.alora.invocation_tokens" in said:
        problems.append("adapter.alora.invocation_tokens: it takes effect only after certain tokens (aLoRA)")
    if problems:
        raise AdapterFileError(f"{path}: not an adapter that can be read for this model:\n{listing(problems)}")


def _names(outline: Outline, family: _Family) -> dict[str, str | None]:
    """Llama.cpp's name for the weight of every layer; None where it has none."""
    package = _package()
    architecture = {name: key for key, name in package.MODEL_ARCH_NAMES.items()}[family.architecture]
    blocks = int(outline.settings.get("num_hidden_layers") or outline.settings.get("n_layer") or 0)
    table = package.get_tensor_name_map(architecture, blocks)
    return {layer: table.get_name(f"{layer}.weight", try_suffixes=(".weight",)) for layer in outline.layers}


def _order(layer: str, outline: Outline, family: _Family, *, back: bool = False) -> Tensor | None:
    """Where each row of a layer's output comes from; None where the order is the model's own.

    transformers rotates the first half of a head against the second, llama.cpp neighbours: rows i and i + d/2 of each
    head of d rows come to lie side by side.
    """
    end = layer.rsplit(".", 1)[-1]
    if not family.interleaved or end not in ("q_proj", "k_proj"):
        return None
    heads = int(outline.settings["num_attention_heads"])
    if end == "k_proj":
        heads = int(outline.settings.get("num_key_value_heads") or heads)
    order = torch.arange(outline.layers[layer].shape.outputs).view(heads, 2, -1).transpose(1, 2).reshape(-1)
    return order.argsort() if back else order


def _with_rows(factors: LowRank, order: Tensor | None) -> LowRank:
    """With the outputs in another order."""
    return factors if order is None else LowRank(factors.A.detach(), factors.B.detach()[order], factors.scale)


def _turned(tensor: Tensor, name: str, end: str) -> Tensor:
    """An embedding's A is stored by words, `[I, R]`; its own inverse."""
    return tensor.t().contiguous() if name == _EMBEDDING and end == "lora_a" else tensor
