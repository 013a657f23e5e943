"""`plan`: one configuration, the same for every method beside it, answering, and what would fit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankwise.planning.config import describe
from rankwise.planning.guide import GUIDE
from rankwise.planning.held import held_of, is_quantised
from rankwise.planning.memory import memory_of
from rankwise.planning.process import ASSUMED
from rankwise.planning.proposal import proposed
from rankwise.planning.request import Machine, PlanRequest, machine_for
from rankwise.planning.shapes import Shapes, shapes_of


def inference_of(shapes: Shapes, request: PlanRequest, machine: Machine) -> dict[str, int]:
    """Bytes for reading `context` tokens and answering: weights, keys and values, one token's logits."""
    sizes = shapes.sizes
    held = held_of(shapes, {}, "lora", request.held_as, machine.width)
    cache = 2 * sizes["kv"] * sizes["layers"] * request.context * machine.width
    largest = max((tensor.count for tensor in shapes.tensors if is_quantised(tensor)), default=0)
    working = request.context * (2 * sizes["hidden"] + 3 * sizes["ffn"]) * machine.width + 4 * sizes["vocab"]
    working += largest * machine.width if request.held_as != "dense" else 0
    process = ASSUMED if machine.device == "cpu" else 0
    found = {"weights": held.weights, "keys_and_values": cache, "working": working, "process": process}
    return {**found, "peak": sum(found.values())}


def plan(model: str | Path, *, memory: int | str | None = None, **settings: Any) -> dict[str, Any]:
    """What training a model takes in memory, before anything of it is loaded.

    Args:
        model: a folder with config.json, a config.json, or an id on the hub.
        memory: bytes there are, or an amount such as `24GiB`; then the best configuration that fits is proposed.
        settings: as the options of `rankwise plan`: method, storage, rank, targets, batch_tokens, checkpointing, ….

    Returns:
        What `rankwise plan --json` prints; sizes are bytes.

    Raises:
        ModelError: the model cannot be found or described.
        SpecError: a setting is unknown or makes no sense.
        TargetError: the targets match no layer of the model.
    """
    request = PlanRequest(**settings)
    described = describe(model)
    shapes = shapes_of(described.config, described.headers, described.name)
    machine = machine_for(request)
    chosen = memory_of(shapes, request, machine)
    turned = request.model_copy(update={"checkpointing": not request.checkpointing})
    other = memory_of(shapes, turned, machine).peak
    return {
        "model": described.name,
        "source": shapes.source,
        "parameters": shapes.parameters,
        "machine": asdict(machine),
        "settings": {**request.model_dump(mode="json"), "storage": request.held_as},
        "memory": chosen.to_json(),
        "without_checkpointing": other if request.checkpointing else chosen.peak,
        "with_checkpointing": chosen.peak if request.checkpointing else other,
        "methods": methods_of(shapes, request, machine),
        "inference": inference_of(shapes, request, machine),
        "guide": [{**asdict(row), "by_rule": row.by_rule(shapes.parameters)} for row in GUIDE],
        "proposal": proposed(shapes, request, machine, memory) if memory is not None else None,
        "notes": [*shapes.notes, *_assumptions(shapes, request, machine)],
    }


_COMPARED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full, float32", {"method": "full", "dtype": "float32"}),
    ("full, 16 bit", {"method": "full", "dtype": "bfloat16"}),
    ("LoRA", {"method": "lora", "storage": "dense"}),
    ("DoRA", {"method": "dora", "storage": "dense"}),
    ("AdaLoRA", {"method": "adalora", "storage": "dense"}),
    ("LoRA, int8", {"method": "lora", "storage": "int8"}),
    ("QLoRA, nf4", {"method": "qlora", "storage": "nf4"}),
)


def methods_of(shapes: Shapes, request: PlanRequest, machine: Machine) -> list[dict[str, Any]]:
    """Every method with the request's other settings; a full one with its own number format and no storage."""
    found = []
    for name, own in _COMPARED:
        asked = request.model_copy(update={"storage": None, **own})
        on = machine_for(asked.model_copy(update={"device": machine.device})) if "dtype" in own else machine
        found.append({"name": name, "dtype": on.dtype, **memory_of(shapes, asked, on).to_json()})
    return found


def _assumptions(shapes: Shapes, request: PlanRequest, machine: Machine) -> list[str]:
    notes = list(machine.reasons)
    if machine.device == "cpu":
        notes.append(f"the process itself is taken to be {ASSUMED / 1e6:,.0f} MB, as measured (planning/process.py)")
    else:
        notes.append("the GPU's own context (some hundred MB) and gaps between tensors are not counted")
    if not shapes.family.packed:
        notes.append("this family goes in padded rows: count the padding as tokens")
    if any(tensor.kind == "experts" for tensor in shapes.tensors):
        notes.append("all experts lie in one tensor a block: they are no layers that can be adapted, nor quantised")
    return notes
