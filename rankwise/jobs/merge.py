"""An adapter merged into its base, written as an ordinary model and proved on logits: what `rankwise merge` does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rankwise.data.template import Template
from rankwise.errors import MergeError, RunFolderError
from rankwise.frozen.load import load_base
from rankwise.jobs.evaluate import load_adapter
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
# Relative difference of logits that one rounding of every weight may cause, by the number format of the result.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def run_merge(model: str, adapter: Path, out: Path, watch: Watch, *, force: bool = False) -> dict[str, Any]:
    """Merges in float32, rounds once to the base's own number format, writes, reads back, and compares logits.

    The comparison is with base + adapter in float32, on fixed prompts, before anything is said to be done.

    Raises:
        MergeError: the written model differs by more than rounding explains; it is not left behind.
        RunFolderError: `out` exists and is not empty.
        RankwiseError: of loading.
    """
    if out.exists() and any(out.iterdir()):
        raise RunFolderError(f"{out}: not empty; nothing was overwritten", hint="choose another --out")
    with watch.stage(f"loading {model}"):
        base = load_base(model, dtype="float32", device="cpu")
    stored = base.stored if base.stored in TOLERANCE else torch.float32
    bank, template = Bank(base.model), Template(base.tokenizer)
    load_adapter(bank, _NAME, adapter, base, template, force=force)
    with watch.stage("base + adapter on the prompts"), bank.use(_NAME):
        want = _logits(base.model, base.tokenizer)
    with watch.stage("merging"):
        report = bank.bake(_NAME)
        beside = out.with_name(f".{out.name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        base.model.to(stored).save_pretrained(beside)
        base.tokenizer.save_pretrained(beside)
        for path in beside.iterdir():
            path.chmod(0o644)  # safetensors makes files that their owner alone can read
    with watch.stage("proving what was written"):
        again = AutoModelForCausalLM.from_pretrained(beside, dtype=torch.float32).eval()
        error = max(_relative(got, wanted) for got, wanted in zip(_logits(again, base.tokenizer), want, strict=True))
    if not error <= TOLERANCE[stored]:
        shutil.rmtree(beside, ignore_errors=True)
        raise MergeError(
            f"the merged model's logits are off by {error:.2g}, at most {TOLERANCE[stored]:g} was expected",
            hint="keep the adapter apart, or merge into a base that is stored in float32",
        )
    if out.exists():
        out.rmdir()
    beside.rename(out)
    return {
        "out": str(out),
        "layers": report.layers,
        "dtype": str(stored).removeprefix("torch."),
        "logits_error": error,
        "tolerance": TOLERANCE[stored],
        "worst_layer_error": report.worst_error,
        "prompts": len(PROMPTS),
    }


@torch.no_grad()
def _logits(model: Any, tokenizer: Any) -> list[Tensor]:
    return [model(input_ids=torch.tensor([tokenizer.encode(text)])).logits[0].float() for text in PROMPTS]


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())
