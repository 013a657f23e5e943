"""A plan held against the truth: real steps in a process of their own, and the prediction that training begins with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.adapters.presets import TARGET_ROLES
from rankwise.adapters.spec import LoraSpec
from rankwise.data.corpus import Corpus
from rankwise.data.examples import Examples
from rankwise.data.order import Order, micro_batches
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.errors import ModelError, RankwiseError, SpecError, TrainingError
from rankwise.formats.record import WHOLE
from rankwise.frozen.load import Base, load_base
from rankwise.jobs.machine import peak_memory_bytes
from rankwise.jobs.request import TrainRequest
from rankwise.kernels.heap import without_thread_cache
from rankwise.kernels.library import native
from rankwise.planning.config import describe
from rankwise.planning.limits import MICRO_TOKENS
from rankwise.planning.memory import Memory, memory_of
from rankwise.planning.process import resident_without
from rankwise.planning.request import PlanRequest, machine_for
from rankwise.planning.shapes import shapes_of
from rankwise.surgery.bank import Bank
from rankwise.tasks import DEFAULT

_STEPS = 2  # the second is the first with gradients and moments in place
_NAME = "measured"
_OF_SPEC = ("form", "rank", "targets", "exclude", "layers", "rank_pattern", "dropout")


# ── measured ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def measured(model: Path, settings: dict[str, Any]) -> dict[str, int]:
    """The peak of two real training steps on random tokens, in a process of their own, and what was predicted for it.

    Args:
        settings: as `PlanRequest`'s.

    Returns:
        `peak`, `process` (measured before the first step, less the weights) and `predicted`, in bytes.

    Raises:
        ModelError: the model is not in a local folder.
        SpecError: a model in float16.
        TrainingError: the steps failed; says the last thing they said.
    """
    request = PlanRequest(**settings)
    if not model.is_dir():
        raise ModelError(f"{model}: --measure takes a model in a local folder", hint="leave out --measure to plan only")
    if machine_for(request).dtype == "float16":
        raise SpecError("models in float16 are not trained here", hint="take bfloat16 or float32")
    job = json.dumps({"model": str(model), "settings": request.model_dump(mode="json", exclude_unset=True)})
    command = [sys.executable, "-m", "rankwise.jobs.plan", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without_thread_cache(os.environ))
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TrainingError(f"the measured steps failed: {said}", hint="leave out --measure, or use fewer tokens")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(model: str, settings: dict[str, Any]) -> dict[str, int]:
    """In the process of its own."""
    request = PlanRequest(**settings)
    machine = machine_for(request)
    _warm_up(getattr(torch, machine.dtype), machine.device)
    base = load_base(model, dtype=machine.dtype, device=machine.device, storage=request.held_as)
    described = describe(model)
    shapes = shapes_of(described.config, described.headers, described.name)
    process = resident_without(_held_bytes(base.model))
    name = None if request.form == WHOLE else _NAME
    loop = Loop(
        max_steps=_STEPS,
        batch_tokens=request.batch_tokens,
        micro_tokens=request.micro_tokens,
        checkpointing=request.checkpointing,
    )
    with Bank(base.model) as bank:
        if name is not None:
            bank.add(name, LoraSpec(**{setting: getattr(request, setting) for setting in _OF_SPEC}))
        train(bank, {name: Run()}, _random(request, base.model.config.get_text_config().vocab_size), loop=loop)
    peak = torch.cuda.max_memory_allocated() if machine.device == "cuda" else peak_memory_bytes()
    return {"peak": peak, "process": process, "predicted": memory_of(shapes, request, machine, process).peak}


def _warm_up(dtype: torch.dtype, device: str) -> None:
    """A step of a tiny model: what a step loads (libraries, kernels, threads) belongs to the process."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    request = PlanRequest(batch_tokens=64, document_tokens=32)
    with Bank(LlamaForCausalLM(config).to(device, dtype)) as bank:
        bank.add(_NAME, LoraSpec(rank=1))
        train(bank, {_NAME: Run()}, _random(request, config.vocab_size), loop=Loop(max_steps=1))


def _random(request: PlanRequest, vocabulary: int) -> Corpus:
    """Enough documents for the steps, as long as the request says, as many tokens supervised."""
    length = max(2, min(request.document_tokens, request.batch_tokens))
    count = _STEPS * max(1, request.batch_tokens // length)
    tokens = np.random.default_rng(0).integers(vocabulary, size=count * length).astype(np.int32)
    mask = np.zeros((count, length), dtype=bool)
    mask[:, length - max(1, round((length - 1) * request.supervised)) :] = True
    lines = np.stack([np.zeros(count), 1 + np.arange(count)], axis=1).astype(np.int64)
    return Corpus(tokens, mask.reshape(-1), np.arange(count + 1) * length, lines, (_NAME,))


# ── before training ──────────────────────────────────────────────────────────────────────────────────────────────────


def predicted_training(request: TrainRequest, base: Base, bank: Bank, examples: Examples) -> Memory | None:
    """What a run will take, from the model and adapter that are there and the documents' own lengths.

    None for other tasks than causal language modelling, where the model has no config that describes it, or the device
    is neither a processor nor CUDA.
    """
    if base.device.type not in MICRO_TOKENS or request.task != DEFAULT:
        return None
    try:
        shapes = shapes_of(base.model.config.to_dict(), {}, base.name)
        asked = _as_plan(request, base, bank, examples)
        # What is loaded by now is the process, the weights and the adapter: the last two are known to the byte.
        process = resident_without(_held_bytes(base.model))
        return memory_of(shapes, asked, machine_for(asked), process).validated(_whole(bank))
    except RankwiseError:  # a model outside the tables is trained all the same
        return None


def _as_plan(request: TrainRequest, base: Base, bank: Bank, examples: Examples) -> PlanRequest:
    lengths, supervised = examples.lengths(), examples.supervised_counts()
    micro = request.micro_tokens or MICRO_TOKENS[base.device.type]
    epoch = Order(lengths, request.seed, request.batch_tokens, request.batch_documents).epoch(0)
    pieces = [piece for step in epoch for piece in micro_batches(step, lengths, micro)]
    largest = max(pieces, key=lambda piece: int(lengths[piece].sum()))
    tokens = int(lengths[largest].sum())
    compiled = base.device.type == "cpu" and base.precision.dtype == torch.bfloat16 and native() is not None
    machine: dict[str, Any] = {
        "dtype": str(base.precision.dtype).removeprefix("torch."),
        "device": base.device.type,
        "kernels": "compiled" if compiled else "plain",
    }
    return PlanRequest(
        **(_of_adapter(bank.adapter(bank.names[0]).spec) if bank.names else {"method": WHOLE}),
        storage=base.storage,
        batch_tokens=max(tokens, request.batch_tokens),
        micro_tokens=tokens,
        document_tokens=max(1, tokens // len(largest)),
        supervised=float(max(supervised[piece].sum() for piece in pieces)) / tokens,
        checkpointing=request.checkpointing,
        **machine,
    )


def _of_adapter(spec: LoraSpec) -> dict[str, Any]:
    named = {name: _written(getattr(spec, name)) for name in ("targets", "exclude")}
    same = {name: getattr(spec, name) for name in ("rank", "layers", "rank_pattern", "dropout")}
    return {"method": spec.form, **named, **same}


def _written(named: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Targets or exclusions as a request has them."""
    return f"re:{named}" if isinstance(named, str) and named not in TARGET_ROLES else named


def _whole(bank: Bank) -> int:
    """Parameters that an adapter trains whole, beside its factors."""
    adapters = [bank.adapter(name) for name in bank.names]
    of_factors = sum(p.numel() for adapter in adapters for site in adapter.sites.values() for p in site.parameters())
    return sum(adapter.parameter_count() for adapter in adapters) - of_factors


def _held_bytes(model: torch.nn.Module) -> int:
    """Parameters, and the codes that stand for some of them."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
