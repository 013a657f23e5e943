"""Training speed, memory and quality against PEFT + transformers' Trainer, and against bare matrix products.

    python benchmarks/train_speed.py --model DIR --data TRAIN.jsonl --valid VALID.jsonl [--documents 200] [--rounds 3]

Same model, same documents with the same tokens and the same supervised ones, same r = 16 on all linear layers, same
optimiser steps of 8 documents.  Sides, each in its own process, in turn, round after round:

    usual      PEFT as people run it: bfloat16 base, float32 adapters, batches of 8 padded to their longest
    best       PEFT at its best: bfloat16 adapters, documents grouped by length
    rankwise
    products   the matrix products of a step alone, by torch, on the shapes of rankwise's micro-batches: what documents
               have in common at their beginning is multiplied once there too

Useful tokens are real ones, padding is none.  Speed is tokens over seconds of all steps but the first; memory is the
highest resident size of the process up to the end of training; validation losses are measured by one program for all.
Prints one JSON object: medians over rounds, ratios of them, and every single figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from where import machine

from rankwise.kernels.heap import without_thread_cache

DOCUMENTS_A_STEP = 8
LR, RANK, ALPHA = 2e-4, 16, 32
SIDES = ("usual", "best", "rankwise", "products")


def documents_of(folder: Path, split: str) -> Any:
    from rankwise.data.store import open_corpus

    return open_corpus(folder / split)[0]


# ── the sides ────────────────────────────────────────────────────────────────────────────────────────────────────────


def padded_batch(batch: list[dict[str, Any]], seen: list[int]) -> dict[str, Any]:
    """Rows padded to the longest; their real tokens are counted into `seen`."""
    import torch

    lengths = torch.tensor([len(row["input_ids"]) for row in batch])
    width = int(lengths.max())
    seen.append(int(lengths.sum()))

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in batch])

    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def run_peft(folder: Path, model_path: str, best: bool, out: Path) -> dict[str, Any]:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    corpus = documents_of(folder, "train")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(model, config, autocast_adapter_dtype=not best)
    rows = []
    for i in range(len(corpus)):
        tokens, mask = corpus.document(i)
        labels = [int(t) if m else -100 for t, m in zip(tokens, mask, strict=True)]
        rows.append({"input_ids": tokens.tolist(), "labels": labels, "length": len(tokens)})

    seen: list[int] = []
    marks: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=DOCUMENTS_A_STEP,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=1.0,
        weight_decay=0.0,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="group_by_length" if best else "random",
        length_column_name="length",
        remove_unused_columns=False,
        seed=0,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: padded_batch(batch, seen),
        callbacks=[Clock()],
    )
    trainer.train()
    peak = peak_memory()
    model.save_pretrained(out)
    # the collator runs one batch ahead; steps are batches in order
    return {"tokens_per_second": sum(seen[1 : len(marks) - 1]) / (marks[-1] - marks[1]), "peak_bytes": peak}


def run_rankwise(folder: Path, model_path: str, out: Path) -> dict[str, Any]:
    import torch
    import transformers

    from rankwise.adapters.spec import LoraSpec
    from rankwise.engine.loop import train
    from rankwise.engine.run import Loop, Run
    from rankwise.surgery.bank import Bank

    corpus = documents_of(folder, "train")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    marks: list[float] = []
    tokens: list[int] = []

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            marks.append(time.perf_counter())
            tokens.append(event["tokens"])

    with Bank(model) as bank:
        bank.add("a", LoraSpec(rank=RANK, alpha=ALPHA, targets="all-linear"))
        train(bank, {"a": Run(lr=LR, warmup=0)}, corpus, loop=Loop(batch_documents=DOCUMENTS_A_STEP), observe=observe)
        peak = peak_memory()
        bank.save("a", out)
    return {"tokens_per_second": sum(tokens[1:]) / (marks[-1] - marks[0]), "peak_bytes": peak}


def run_products(folder: Path, model_path: str) -> dict[str, Any]:
    """Forward and input-gradient products of every frozen linear layer and of the head on supervised tokens; beside it
    the same with the six thin products of each adapter.
    """
    import numpy as np
    import torch
    import transformers

    from rankwise.adapters.presets import TARGET_ROLES
    from rankwise.data.order import Order, micro_batches
    from rankwise.data.stream import lay
    from rankwise.engine.head import chunk_rows
    from rankwise.kernels.heap import keep_freed_memory
    from rankwise.planning.limits import MICRO_TOKENS
    from rankwise.surgery.sites import find_sites

    keep_freed_memory()
    corpus = documents_of(folder, "train")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).requires_grad_(False)
    sites = [s for s in find_sites(model).values() if s.role in TARGET_ROLES["all-linear"]]
    weights, head = [site.module.weight for site in sites], model.get_output_embeddings().weight
    lengths = corpus.lengths()
    steps = Order(lengths, 0, 1, DOCUMENTS_A_STEP).epoch(0)[:6]
    micros = [m for step in steps for m in micro_batches(step, lengths, MICRO_TOKENS["cpu"])]
    thin = {n: torch.randn(n, RANK).bfloat16() for n in {size for w in weights for size in w.shape}}

    def once(micro: np.ndarray, adapters: bool) -> None:
        stream = lay(corpus, micro, [len(micro)])
        tokens, targets = stream.size, len(stream.targets)
        x = {n: torch.ones(tokens, n, dtype=torch.bfloat16) for n in thin}
        shrunk = torch.ones(tokens, RANK, dtype=torch.bfloat16)
        for w in weights:
            y = x[w.shape[1]] @ w.t()
            if adapters:
                shrunk = x[w.shape[1]] @ thin[w.shape[1]]
                y.addmm_(shrunk, thin[w.shape[0]].t())
        for at in range(0, targets, chunk_rows(len(head), torch.bfloat16, head.device)):
            rows = x[head.shape[1]][at : at + chunk_rows(len(head), torch.bfloat16, head.device)]
            (rows[: targets - at] @ head.t()) @ head
        for w in reversed(weights):
            g = x[w.shape[0]]
            dx = g @ w
            if adapters:
                d_shrunk = g @ thin[w.shape[0]]
                dx.addmm_(d_shrunk, thin[w.shape[1]].t())
                d_shrunk.t() @ x[w.shape[1]], shrunk.t() @ g

    found = {}
    for name, adapters in (("tokens_per_second", False), ("with_adapters_tokens_per_second", True)):
        once(micros[0], adapters)
        speeds = []
        for micro in micros:
            begun = time.perf_counter()
            once(micro, adapters)
            speeds.append((int(lengths[micro].sum()), time.perf_counter() - begun))
        found[name] = sum(t for t, _ in speeds) / sum(s for _, s in speeds)
    return found | {"peak_bytes": peak_memory()}


# ── the comparison ───────────────────────────────────────────────────────────────────────────────────────────────────


def prepare_documents(arguments: argparse.Namespace, folder: Path) -> None:
    from transformers import AutoTokenizer

    from rankwise.data.prepare import prepare
    from rankwise.data.store import save_corpus
    from rankwise.data.template import Template

    template = Template(AutoTokenizer.from_pretrained(arguments.model))
    for split, path in (("train", arguments.data), ("valid", arguments.valid)):
        corpus = prepare(path, template, 2048).corpus
        save_corpus(corpus.subset(range(min(len(corpus), arguments.documents))), folder / split)


def validation_losses(folder: Path, model_path: str, adapters: dict[str, Path]) -> dict[str, float]:
    import torch
    import transformers

    from rankwise.engine.evaluate import evaluate
    from rankwise.surgery.bank import Bank

    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    with Bank(model) as bank:
        for name, path in adapters.items():
            bank.load(name, path, force=True)
        found = evaluate(bank, list(adapters), documents_of(folder, "valid"))
    return {"base": found.loss(found.base)} | {
        name: found.loss(row) for name, row in zip(adapters, found.losses, strict=True)
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_documents(arguments, folder)
        for number in range(arguments.rounds):
            for side in SIDES:
                out = folder / f"{side}-{number}"
                out.mkdir()
                command = [sys.executable, __file__, "--model", arguments.model, "--side", side]
                done = subprocess.run(
                    [*command, "--folder", str(folder), "--out", str(out)],
                    capture_output=True,
                    text=True,
                    check=False,
                    env=without_thread_cache(os.environ),
                )
                if done.returncode:
                    raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
                figures[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(side, figures[side][-1], "load", os.getloadavg()[0], file=sys.stderr, flush=True)
        adapters = {side: folder / f"{side}-0" for side in ("usual", "best", "rankwise")}
        losses = validation_losses(folder, arguments.model, adapters)
        corpus = documents_of(folder, "train")
        documents = {"documents": len(corpus), "tokens": len(corpus.tokens), "supervised": int(corpus.supervised.sum())}

    def median(side: str, name: str) -> float:
        return statistics.median(figure[name] for figure in figures[side])

    speed = {side: median(side, "tokens_per_second") for side in SIDES}
    peak = {side: median(side, "peak_bytes") for side in ("usual", "best", "rankwise")}
    with_adapters = median("products", "with_adapters_tokens_per_second")
    return {
        "what": "LoRA training, r = 16 all-linear, steps of 8 documents",
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).parent.name,
        **documents,
        "machine": machine("peft"),
        "rounds": arguments.rounds,
        "tokens_per_second": speed | {"products_with_adapters": with_adapters},
        "peak_gb": {side: bytes_ / 1e9 for side, bytes_ in peak.items()},
        "validation_loss": losses,
        "ratios": {
            "speed_over_usual": speed["rankwise"] / speed["usual"],
            "speed_over_best": speed["rankwise"] / speed["best"],
            "speed_of_products": speed["rankwise"] / speed["products"],
            "speed_of_products_with_adapters": speed["rankwise"] / with_adapters,
            "memory_of_usual": peak["rankwise"] / peak["usual"],
            "memory_of_best": peak["rankwise"] / peak["best"],
            "loss_over_usual": losses["rankwise"] / losses["usual"],
            "loss_over_best": losses["rankwise"] / losses["best"],
        },
        "every": figures,
    }


def peak_memory() -> int:
    from rankwise.jobs.machine import peak_memory_bytes

    return peak_memory_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data")
    parser.add_argument("--valid")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is None:
        print(json.dumps(compare(arguments), indent=2))
    elif arguments.side == "rankwise":
        print(json.dumps(run_rankwise(arguments.folder, arguments.model, arguments.out)))
    elif arguments.side == "products":
        print(json.dumps(run_products(arguments.folder, arguments.model)))
    else:
        print(json.dumps(run_peft(arguments.folder, arguments.model, arguments.side == "best", arguments.out)))


if __name__ == "__main__":
    main()
