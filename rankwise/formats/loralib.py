"""Checkpoints of loralib, the code that came with the paper: `<layer>.lora_A` `[R, I]` and `<layer>.lora_B` `[O, R]`.

Format: github.com/microsoft/LoRA, loralib/layers.py; read, not written.  A checkpoint is a pickled state dict, of which
torch's restricted reader (`weights_only=True`) takes tensors and nothing that could run; or safetensors.  Alpha is not
in it.  A merged layer, such as GPT-2's `c_attn`, has G pairs of factors in one: A `[G·R, I]` and B `[G·O/N, R]` for the
G of its N parts that `enable_lora` names.  Here it becomes one layer of rank G·R, whose B has zeros where parts do not
meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank
from rankwise.errors import AdapterFileError, SpecError, listing
from rankwise.formats.portable import Portable, Terms, from_factors
from rankwise.formats.tensors import read_tensors

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_QUERY_AND_VALUE = (True, False, True)  # of the paper's GPT-2
_CONV1D = ("c_attn", "c_proj", "c_fc")  # GPT-2's names of layers that store [I, O]


def read_adapter(path: Path, terms: Terms) -> Portable:
    """An adapter from a checkpoint; `terms` has its alpha, and which parts of merged layers it changes.

    Raises:
        AdapterFileError: it cannot be read, or has tensors that no adapter has a place for; lists them all.
        SpecError: alpha was not said.
    """
    state = read_state(path)
    if terms.alpha is None:
        raise SpecError(
            f"{path}: loralib's files do not say their alpha", hint="--alpha, as it was in training: lora_alpha there"
        )
    found, rest = sorted_out(state)
    problems, sites, notes = [], {}, []
    for name, parts in found.items():
        A, B = parts.get("A"), parts.get("B")
        if A is None or B is None:
            problems.append(f"{name}: has lora_{next(iter(parts))} only")
            continue
        try:
            A, B, merged = _whole(name, A.float(), B.float(), terms)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        sites[name] = LowRank(A, B, terms.alpha / parts["B"].shape[1])
        notes += [merged] if merged else []
    modules, strangers = _modules(rest, sites)
    problems += strangers
    if problems:
        raise AdapterFileError(f"{path}: {len(problems)} parts cannot be understood:\n{listing(problems)}")
    if not sites:
        raise AdapterFileError(f"{path}: holds no factors of any layer")
    transposed = any(name.rsplit(".", 1)[-1] in _CONV1D for name in sites)
    told = tuple(f"{count} merged layer{'s' * (count > 1)}: {note}" for note, count in _counted(notes).items())
    return Portable(from_factors(sites, modules), transposed=transposed, notes=told).known_on(terms.outline)


def enabled_parts(said: str | None) -> tuple[bool, ...]:
    """What `--enable-lora` says: `true,false,true`, one for each part of a merged layer.

    Raises:
        SpecError: it says something else.
    """
    words = [word.strip().lower() for word in said.split(",")] if said is not None else []
    if any(word not in ("true", "false") for word in words) or (words and "true" not in words):
        raise SpecError(f"--enable-lora {said!r}: not one true or false for each part", hint="such as true,false,true")
    return tuple(word == "true" for word in words)


def read_state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, all finite; a table within it that is called a state dict is opened.

    Raises:
        AdapterFileError: it is missing, damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        reason = str(error).split("\n", 1)[0]
        raise AdapterFileError(
            f"{path}: not a checkpoint of tensors alone: {reason}",
            hint="what would have to be run to be read is never opened; save its state dict alone, as safetensors",
        ) from None
    for name in ("model_state_dict", "state_dict"):
        state = state[name] if isinstance(state, Mapping) and isinstance(state.get(name), Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise AdapterFileError(
            f"{path}: not a state dict of tensors", hint="torch.save(lora.lora_state_dict(model), …)"
        )
    broken = [str(name) for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterFileError(f"{path}: {len(broken)} tensors are not finite:\n{listing(broken)}")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}  # of DistributedDataParallel


def sorted_out(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Factors by layer, and the tensors that are none."""
    found: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in state.items():
        path, _, end = key.rpartition(".")
        if end in ("lora_A", "lora_B"):
            found.setdefault(path, {})[end[-1]] = tensor
        else:
            rest[key] = tensor
    return found, rest


def _whole(name: str, A: Tensor, B: Tensor, terms: Terms) -> tuple[Tensor, Tensor, str]:
    """A `[R, I]` and B `[O, R]` of a layer, and what was taken for granted of a merged one.

    Raises:
        ValueError: the shapes are those of no layer.
    """
    if A.dim() != 2 or B.dim() != 2 or len(A) % B.shape[1]:
        raise ValueError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not factors of one rank")
    outputs = None
    if terms.outline is not None and name in terms.outline.layers:
        layer = terms.outline.layers[name]
        if layer.kind == "convolution":
            raise ValueError("a convolution, whose change in loralib is no product of two convolutions")
        outputs = layer.shape.outputs
    groups = len(A) // B.shape[1]
    if groups == 1 and (outputs is None or outputs == len(B)):
        return A, B, ""
    enabled, note = terms.enable_lora, ""
    if not enabled and groups == 1:
        raise ValueError(f"has {len(B)} of {outputs} outputs; --enable-lora says which part of a merged layer they are")
    if not enabled:
        enabled = (True,) * groups if groups != 2 else _QUERY_AND_VALUE
        note = f"taken as enable_lora={list(enabled)}, which the file does not say (--enable-lora)"
    if sum(enabled) != groups or len(B) % groups:
        raise ValueError(f"{groups} matrices in one, of which enable_lora={list(enabled)} has {sum(enabled)}")
    rank, rows = B.shape[1], len(B) // groups
    whole = B.new_zeros(rows * len(enabled), len(A))
    for group, part in enumerate(part for part, on in enumerate(enabled) if on):
        own = B[group * rows : (group + 1) * rows]
        whole[part * rows : (part + 1) * rows, group * rank : (group + 1) * rank] = own
    return A, whole, note


def _modules(rest: Mapping[str, Tensor], sites: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors of a head that was trained whole, by its path, and those that are neither its nor a factor's."""
    roots = {path.split(".", 1)[0] for path in sites}
    modules: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in rest.items():
        root, _, name = key.partition(".")
        if root in roots or not name:
            strangers.append(f"{key}: trained beside the factors (a bias?), which an adapter has no place for")
        else:
            modules.setdefault(root, {})[name] = tensor.float()
    return modules, strangers


def _counted(notes: list[str]) -> dict[str, int]:
    return {note: notes.count(note) for note in dict.fromkeys(notes)}
