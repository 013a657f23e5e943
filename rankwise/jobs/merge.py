"""An adapter merged into its base, written as an ordinary model and proved on logits: what `rankwise merge` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.engine.tasks.choose import task_named
from rankwise.errors import MergeError
from rankwise.frozen.load import Base, load_base
from rankwise.jobs.evaluate import load_adapter, trained_classes, trained_task
from rankwise.jobs.place import whole_folder
from rankwise.jobs.reader import load_for, reader_for
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Watch
from rankwise.jobs.whole import check_adapters
from rankwise.surgery.bank import Bank
from rankwise.tasks import DEFAULT

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


def run_merge(
    model: str, adapter: Path, out: Path, watch: Watch, *, rank: int | None = None, force: bool = False
) -> dict[str, Any]:
    """Merges in float32, rounds once to the base's own number format, writes, reads back, and compares logits.

    The comparison is with base + adapter in float32, on fixed prompts, before anything is said to be done.  A nested
    adapter is merged at its `rank`, if one is given.

    Raises:
        MergeError: the written model differs by more than rounding explains; it is not left behind.
        SpecError: the adapter's folder holds a model that was trained whole, or it has not that rank.
        RunFolderError: `out` exists and is not an empty folder, or cannot be written.
        RankwiseError: of loading.
    """
    check_adapters([adapter], "use it as it is: it has nothing to merge")
    task = trained_task([adapter])
    with whole_folder(out.expanduser().resolve()) as place:
        with watch.stage(f"loading {model}"):
            loaded, classes = load_for(model, task, trained_classes([adapter], task), dtype="float32", device="cpu")
        base = with_tokens_of(loaded, [adapter], force=force)
        stored = base.stored if base.stored in TOLERANCE else torch.float32
        bank = Bank(base.model)
        reader = reader_for(base, classes, max_length=2048, overlong="truncate", train_on="all")
        load_adapter(bank, _NAME, adapter, base, reader.digest, rank=rank, force=force)
        own = sorted({i for rows in bank.adapter(_NAME).tokens.values() for i in rows.tokens})
        inputs = _inputs(base, own)
        with watch.stage("base + adapter on the prompts"), bank.use(_NAME):
            want = _logits(base.model, inputs)
        with watch.stage("merging"):
            report = bank.bake(_NAME)
            _prove(base.model, inputs, want, torch.float32)  # before a rounding could hide a mistake
            base.model.to(stored).save_pretrained(place)
            base.tokenizer.save_pretrained(place)
        with watch.stage("proving what was written"):
            again = load_base(place, dtype="float32", device="cpu", task=task, classes=base.classes)
            error = _prove(again.model, inputs, want, stored)
    return {
        "out": str(out),
        "layers": report.layers,
        "tokens": len(own),
        "dtype": str(stored).removeprefix("torch."),
        "logits_error": error,
        "tolerance": TOLERANCE[stored],
        "worst_layer_error": report.worst_error,
        "prompts": len(inputs),
    }


def _prove(model: Any, inputs: list[dict[str, Tensor]], want: list[Tensor], held: torch.dtype) -> float:
    """The largest relative difference of a model's logits from `want`, if the number format explains it."""
    error = max(_relative(got, wanted) for got, wanted in zip(_logits(model, inputs), want, strict=True))
    if not error <= TOLERANCE[held]:
        raise MergeError(
            f"the merged model's logits are off by {error:.2g}, at most {TOLERANCE[held]:g} was expected",
            hint="keep the adapter apart, or merge into a base that is stored in float32",
        )
    return error


def _inputs(base: Base, own: list[int]) -> list[dict[str, Tensor]]:
    """What the proof is made on: the prompts, and the tokens that are the adapter's `own`.

    Where a model reads something else, what the engine probes it with.
    """
    if base.task == DEFAULT:
        texts = [*(base.tokenizer.encode(text) for text in PROMPTS), *([own] if own else [])]
        return [{"input_ids": torch.tensor([tokens])} for tokens in texts]
    task = task_named(base.task)(base.model)
    probe = task.probe()
    batches = [task.rows(probe, [i]) for i in range(len(probe))]
    found = [{name: torch.as_tensor(array) for name, array in batch.inputs.items()} for batch in batches]
    alone = {name: torch.tensor([own]) for name in found[0] if name.endswith("input_ids")}
    return [*found, alone] if own else found


@torch.no_grad()
def _logits(model: Any, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    return [model(**one).logits[0].float() for one in inputs]


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())
