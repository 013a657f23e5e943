"""An adapter merged into its base, written as an ordinary model and proved on logits: what `rankwise merge` does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from rankwise.data.template import Template
from rankwise.errors import MergeError, RunFolderError
from rankwise.frozen.load import load_base
from rankwise.jobs.evaluate import load_adapter
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Watch
from rankwise.surgery.bank import Bank

_NAME = "adapter"
# Texts in several languages and in code: the proof is made on what they become, token by token.
PROMPTS = (
    "The smallest rank that is not measurably worse is the one to keep.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Der Zug nach Hamburg hat heute zehn Minuten Verspätung.",
    "低秩适配器只训练很少的参数。",
    '{"name": "rankwise", "tags": ["lora", "qlora"], "rank": 16}',
)
# Relative difference of logits that holding the merged weights in a number format may cause.  Measured with random
# adapters on every linear layer, ‖ΔW‖ from 1e-4 to 1 times ‖W‖, on two-layer models and on SmolLM2-135M (30 layers):
# float32 1.6e-6; float16 up to 1.1e-3, bfloat16 up to 7.9e-3, with ‖ΔW‖ = ‖W‖ 1.8e-3 and 1.8e-2.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def run_merge(model: str, adapter: Path, out: Path, watch: Watch, *, force: bool = False) -> dict[str, Any]:
    """Merges in float32, rounds once to the base's own number format, writes, reads back, and compares logits.

    The comparison is with base + adapter in float32, on fixed prompts, before anything is said to be done.

    Raises:
        MergeError: the written model differs by more than rounding explains; it is not left behind.
        RunFolderError: `out` exists and is not an empty folder, or cannot be written.
        RankwiseError: of loading.
    """
    with _beside(out.expanduser().resolve()) as place:
        with watch.stage(f"loading {model}"):
            base = with_tokens_of(load_base(model, dtype="float32", device="cpu"), [adapter], force=force)
        stored = base.stored if base.stored in TOLERANCE else torch.float32
        bank, template = Bank(base.model), Template(base.tokenizer)
        load_adapter(bank, _NAME, adapter, base, template, force=force)
        prompts = [base.tokenizer.encode(text) for text in PROMPTS]
        if own := sorted({i for rows in bank.adapter(_NAME).tokens.values() for i in rows.tokens}):
            prompts.append(own)
        with watch.stage("base + adapter on the prompts"), bank.use(_NAME):
            want = _logits(base.model, prompts)
        with watch.stage("merging"):
            report = bank.bake(_NAME)
            _prove(base.model, prompts, want, torch.float32)  # before a rounding could hide a mistake
            base.model.to(stored).save_pretrained(place)
            base.tokenizer.save_pretrained(place)
        with watch.stage("proving what was written"):
            again = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
            error = _prove(again, prompts, want, stored)
    return {
        "out": str(out),
        "layers": report.layers,
        "tokens": len(own),
        "dtype": str(stored).removeprefix("torch."),
        "logits_error": error,
        "tolerance": TOLERANCE[stored],
        "worst_layer_error": report.worst_error,
        "prompts": len(prompts),
    }


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` when all has gone well, and is not left behind when not."""
    place = out.with_name(f".{out.name}.part")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunFolderError(f"{out}: not an empty folder; nothing was overwritten", hint="choose another --out")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        yield place
        for path in place.iterdir():
            path.chmod(0o644)  # safetensors makes files that their owner alone can read
        if out.exists():
            out.rmdir()
        place.rename(out)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise RunFolderError(f"{out}: cannot be written: {error}", hint="make room, or choose another --out") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _prove(model: Any, prompts: list[list[int]], want: list[Tensor], held: torch.dtype) -> float:
    """The largest relative difference of a model's logits from `want`, if the number format explains it."""
    error = max(_relative(got, wanted) for got, wanted in zip(_logits(model, prompts), want, strict=True))
    if not error <= TOLERANCE[held]:
        raise MergeError(
            f"the merged model's logits are off by {error:.2g}, at most {TOLERANCE[held]:g} was expected",
            hint="keep the adapter apart, or merge into a base that is stored in float32",
        )
    return error


@torch.no_grad()
def _logits(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([tokens])).logits[0].float() for tokens in prompts]


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())
