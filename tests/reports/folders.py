"""Run folders as the engine writes them, with seeded noise: what the tests of this room read."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

SETTINGS = (
    ("rank", 16, "the guides' default for one task"),
    ("lr", 2e-4, "ten times a full fine-tuning's rate, the middle of 1e-4 … 5e-4"),
    ("targets", "all-linear", "best quality; 4.9 M parameters fit this machine"),
    ("dtype", "bfloat16", "the processor has AMX-BF16; a product takes half the time"),
    ("batch_tokens", 4096, "largest that keeps the peak below 2 GB"),
    ("early_stop", None, "no validation loss to watch was refused"),
)
HOSTILE = '<script>alert("gotcha")</script>'


def record(**changes: Any) -> dict[str, Any]:
    """rankwise.json of a run with every fact."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    split = {"documents": 1912, "tokens": 412_806, "supervised": 38_214, "truncated": 17}
    return {
        "schema": 1,
        "spec": {
            "rank": 16,
            "alpha": 32,
            "targets": "all-linear",
            "form": "lora",
            "scaling": "alpha/r",
            "storage": "dense",
            "dropout": 0.0,
            "init": "kaiming",
            "rank_pattern": {},
            "alpha_pattern": {},
            "modules_to_save": [],
        },
        "base": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "fingerprint": "5f0c" * 16},
        "digest": "a71e" * 16,
        "parameters": 4_884_480,
        "sites": {
            f"model.layers.{layer}.{name}": {"rank": 16, "scale": 2.0, "alpha": 32}
            for layer in range(30)
            for name in names
        },
        "modules": [],
        "versions": {"rankwise": "0.1.0", "torch": "2.13.0", "transformers": "5.10.1", "python": "3.11.7"},
        "machine": {"processor": "AMD EPYC 9R14", "cores": 2, "memory": "23 GB", "bfloat16": True},
        "settings": [{"name": name, "value": value, "reason": reason} for name, value, reason in SETTINGS],
        "data": {
            "train": {"files": [{"path": "train.jsonl", "sha256": "9b" * 32}], **split, "dropped": {"no answer": 3}},
            "valid": {
                "files": [{"path": "valid.jsonl", "sha256": "c4" * 32}],
                **split,
                "documents": 214,
                "dropped": {},
            },
        },
        "template": {"digest": "77" * 32},
        "training": {
            "steps": 300,
            "epochs": 1.5,
            "tokens": 619_209,
            "supervised": 57_321,
            "seconds": 161.4,
            "tokens_per_second": 3836.4,
            "peak_memory_bytes": 1_214_000_000,
            "stopped": "finished",
            "best_step": 250,
            "skipped_steps": 0,
        },
        "command": "rankwise train --model SmolLM2 --data train.jsonl --valid valid.jsonl --out runs/docstrings",
    } | changes


def metrics(steps: int = 300, adapter: str = "tuned", every: int = 25) -> list[dict[str, Any]]:
    dice = random.Random(7)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        level = 1.86 + 0.85 * math.exp(-step / 45)
        lines.append(
            {
                "kind": "step",
                "step": step,
                "adapter": adapter,
                "loss": level + dice.gauss(0, 0.13),
                "lr": 2e-4 * min(step / 15, (steps + 15 - step) / steps),
                "grad_norm": 0.35 + 1.3 * math.exp(-step / 30) + abs(dice.gauss(0, 0.12)),
                "tokens": dice.randint(3000, 4096),
                "supervised": dice.randint(200, 500),
                "seconds": 0.53,
            }
        )
        if step % every == 0:
            loss = level + 0.22 + 0.0002 * max(0, step - 250)
            lines.append({"kind": "evaluation", "step": step, "adapter": adapter, "loss": loss, "documents": 214})
    return lines


def evaluation(
    documents: int = 214, shift: float = -0.41, half: float = 0.042, names: tuple[str, ...] = ("tuned",)
) -> dict[str, Any]:
    """Paired losses that really add up; `half` is the half-width of the interval."""
    dice = random.Random(11)
    tokens = [dice.randint(8, 60) for _ in range(documents)]
    base = [count * max(0.4, dice.gauss(2.5, 0.5)) for count in tokens]
    total = sum(tokens)
    adapters, sums = [], {}
    for number, name in enumerate(names):
        moved = [
            nats + count * (dice.gauss(shift, 0.28) + 0.3 * number) for nats, count in zip(base, tokens, strict=True)
        ]
        sums[name] = moved
        mean = (sum(moved) - sum(base)) / total
        adapters.append(
            {
                "name": name,
                "loss": sum(moved) / total,
                "delta": {"mean": mean, "low": mean - half, "high": mean + 1.1 * half},
            }
        )
    return {
        "documents": documents,
        "tokens": total,
        "base": {"loss": sum(base) / total},
        "adapters": adapters,
        "per_document": {"tokens": tokens, "base": base, "adapters": sums},
        "confidence": 0.95,
    }


def classified(documents: int = 214, reference: str = "class frequencies", **changes: Any) -> dict[str, Any]:
    """The same for classes: one loss a document, and how often the right one was said."""
    plain = evaluation(documents)
    tokens = [1] * documents
    base = [
        nats / count for nats, count in zip(plain["per_document"]["base"], plain["per_document"]["tokens"], strict=True)
    ]
    tuned = [nats - 0.4 for nats in base]
    share = {"value": 0.905, "low": 0.858, "high": 0.938}
    adapter = {
        "name": "tuned",
        "loss": sum(tuned) / documents,
        "delta": {"mean": -0.4, "low": -0.45, "high": -0.36},
        "accuracy": share,
        "macro_f1": 0.871,
        "accuracy_delta": {"mean": 0.4, "low": 0.33, "high": 0.47, "mcnemar_p": 1.5e-12},
    }
    before = {"value": 0.505, "low": 0.438, "high": 0.571}
    return {
        "documents": documents,
        "tokens": documents,
        "reference": reference,
        "classes": ["bad", HOSTILE],
        "base": {"loss": sum(base) / documents, "accuracy": before, "macro_f1": 0.336},
        "adapters": [adapter],
        "per_document": {"tokens": tokens, "base": base, "adapters": {"tuned": tuned}},
        "confidence": 0.95,
    } | changes


SAMPLES = [
    {
        "prompt": "Say in one sentence what this function does.\n\n"
        "def clamp(x, low, high):\n    return max(low, min(x, high))",
        "reference": "Return x limited to the range from low to high.",
        "before": "This function takes in three parameters: x, low and high. It then uses the max function to find the "
        "maximum value between low and the minimum of x and high. Sure! Let me know if you have questions.",
        "after": "Limit x to the range low … high.",
    },
    {
        "prompt": f"def page(title):\n    return f'<h1>{{title}}</h1>{HOSTILE}'",
        "reference": f"Return the page as HTML. {HOSTILE}",
        "before": f"```python\n{HOSTILE}\n</pre></div></style></textarea>\n"
        + "".join(f"    result_{i} = some_long_function_name(argument_{i}, another_argument={i})\n" for i in range(60))
        + "```",
        "after": f"Return an HTML page with a title & {HOSTILE}.",
    },
    {
        "prompt": "请用一句话说明仁寿殿。",
        "reference": "仁寿殿位于颐和园东宫门内，是园内最主要的政治活动场所。",
        "before": "我不太清楚您的问题，能否请您再详细说明一下？",
        "after": "仁寿殿在颐和园东宫门内，是慈禧、光绪坐朝听政的大殿。",
    },
]


def write_run(folder: Path, **parts: Any) -> Path:
    """A whole run; `record`, `metrics`, `evaluation`, `samples` replace a part, and None leaves it out."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"record": record(), "metrics": metrics(), "evaluation": evaluation(), "samples": SAMPLES} | parts
    for name, part in (("rankwise.json", "record"), ("evaluation.json", "evaluation"), ("samples.json", "samples")):
        if parts[part] is not None:
            (folder / name).write_text(json.dumps(parts[part], ensure_ascii=False), encoding="utf-8")
    if parts["metrics"] is not None:
        text = "".join(json.dumps(line) + "\n" for line in parts["metrics"])
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder
