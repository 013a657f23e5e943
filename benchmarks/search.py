"""`rankwise search` against an exhaustive grid on the same base and documents.

    python benchmarks/search.py --model DIR --task sequence-classification --data DIR [--data DIR …] [--documents 600]

Each DIR holds train.jsonl, valid.jsonl and test.jsonl.  For each: (1) the search, up to its recommendation; (2) one
run of the grid's middle by PEFT and transformers' Trainer, in each number format that the machine multiplies, of which
the faster one times a grid that is run one by one; (3) the grid, every rate × every rank at full length with one seed,
through the same engine, of which the search knows nothing; (4) the adapter of the grid's best rate at rank 32, made
smaller by `compress` on the documents that the search chose by.  The regret is the loss of what was recommended less
that of the grid's best, on the test documents, which neither looked at; the grid's best is the best on these very
documents, so that chance counts against the search.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

RANKS = (2, 4, 8, 16, 32, 64)
POWERS = (-2, -1, 0, 1, 2, 3)
ALPHA, RANK, LARGE = 32, 16, 32


def request(arguments: argparse.Namespace, data: Path, out: Path) -> Any:
    from rankwise.jobs.request import TrainRequest

    files = {}
    for part, most in (("train", arguments.documents), ("valid", arguments.judged), ("test", arguments.judged)):
        rows = (data / f"{part}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:most]
        place = out.parent / f"{data.name}-{part}.jsonl"
        place.write_text("".join(rows), encoding="utf-8")
        files[part] = str(place)
    settings = {"alpha": ALPHA, "rank": RANK, "lr": arguments.lr, "max_length": 256, "epochs": arguments.epochs}
    judged = {"valid": files["valid"], "test": files["test"]}
    return TrainRequest(
        model=arguments.model, task=arguments.task, data=(files["train"],), out=out, **judged, **settings
    )


def compare(arguments: argparse.Namespace, data: Path, place: Path) -> dict[str, Any]:
    from rankwise.jobs.search import SearchRequest, opened, run_search
    from rankwise.jobs.watch import Quiet
    from rankwise.search.rule import lowest
    from rankwise.search.statistics import difference

    (place / "grid").mkdir(parents=True)
    asked = SearchRequest(budget=arguments.budget, ranks=RANKS, until="confirm")
    began = time.perf_counter()
    found = run_search(asked, request(arguments, data, place / "search"), Quiet())
    seconds = time.perf_counter() - began
    told = found["recommendation"]
    peft = {dtype: _peft(arguments, data, dtype) for dtype in ("float32", "bfloat16")}
    with opened(asked, request(arguments, data, place / "grid"), Quiet()) as (advisor, _, _):
        trials, begun = advisor.trials, time.perf_counter()
        cells = [(arguments.lr * 2.0**power, rank) for power, rank in product(POWERS, RANKS)]
        candidates = [advisor.candidate(rank, lr) for lr, rank in cells]
        grid = trials.made("grid", candidates, [0], 1.0)
        packed = time.perf_counter() - begun
        own = trials.made("grid", [advisor.candidate(told["rank"], told["lr"], told["targets"])], [0], 1.0)
        losses, ours = advisor.losses(grid, "confirm"), advisor.losses(own, "confirm")[0]
        items = trials.items("confirm")
        best = lowest([advisor.mean(one, "confirm") for one in losses])
        gain = advisor.gain(losses[best], "confirm")["mean"]
        regret = difference(ours, losses[best], items)
        of_large = [i for i, (_, rank) in enumerate(cells) if rank == LARGE]
        chosen = lowest([advisor.mean(advisor.losses([grid[i]])[0]) for i in of_large])
        smaller = cut(advisor, candidates[of_large[chosen]])
    one_by_one = min(peft.values()) * len(cells)
    allowed = max(regret.error, 0.02 * gain)
    return {
        "data": data.name,
        "recommendation": {key: told[key] for key in ("kind", "rank", "lr", "targets", "sentence")},
        "best_of_grid": {"lr": cells[best][0], "rank": cells[best][1], "loss": advisor.mean(losses[best], "confirm")},
        "regret": {"mean": regret.mean, "error": regret.error, "allowed": allowed, "within": regret.mean <= allowed},
        "gain": gain,
        "compress": smaller,
        "seconds": {"search": seconds, "grid, packed": packed, "one run, PEFT": peft, "grid, PEFT": one_by_one},
        "ratio_to_grid": seconds / one_by_one,
        "runs": found["cost"]["runs"],
        "noise": {key: found["noise"][key] for key in ("deviation", "detectable", "tolerance")},
        "grid": [
            {"lr": lr, "rank": rank, "loss": advisor.mean(one, "confirm")}
            for (lr, rank), one in zip(cells, losses, strict=True)
        ],
    }


def cut(advisor: Any, candidate: Any) -> dict[str, Any]:
    """What `compress` leaves of a large adapter, judged on documents that neither it nor training has seen."""
    from rankwise.engine.evaluate import measured
    from rankwise.errors import DataError
    from rankwise.search.compression import compress

    trials = advisor.trials
    bank, items = trials.bank, trials.items("confirm").sum()
    bank.put("large", trials.adapter("grid", candidate, 0))
    try:
        found = compress(bank, "large", trials.documents.choose, frequencies=trials.documents.frequencies)
    except DataError as reason:
        return {"fewer": 0.0, "why": reason.message.splitlines()[0]}
    bank.put("small", found.adapter)
    large, small = (losses.sum() / items for losses in measured(bank, ["large", "small"], trials.documents.confirm)[0])
    for name in ("large", "small"):
        bank.remove(name)
    base = trials.base("confirm").sum() / items
    share = found.chosen.parameters / found.parameters
    return {"rank": LARGE, "lr": candidate.run.lr, "fewer": 1 - share, "gain_lost": (small - large) / (base - large)}


def _peft(arguments: argparse.Namespace, data: Path, dtype: str) -> float:
    """Seconds of one run."""
    asked = ["--peft", str(data), "--dtype", dtype, "--model", arguments.model, *_same(arguments)]
    done = subprocess.run([sys.executable, __file__, *asked], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _same(arguments: argparse.Namespace) -> list[str]:
    return ["--documents", str(arguments.documents), "--epochs", str(arguments.epochs), "--lr", str(arguments.lr)]


def run_peft(arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """One run of the grid, training alone, as people run it: 32 texts a step, sorted by length into batches."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = rows[: arguments.documents]
    labels = sorted({row["label"] for row in rows})
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(arguments.model, num_labels=len(labels), dtype=getattr(torch, arguments.dtype))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="SEQ_CLS")
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    examples = []
    for row in rows:
        found = tokenizer(row["text"], truncation=True, max_length=256)
        examples.append({**found, "labels": labels.index(row["label"]), "length": len(found["input_ids"])})
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=32,
            num_train_epochs=arguments.epochs,
            learning_rate=arguments.lr,
            bf16=arguments.dtype == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
        )
        trainer = transformers.Trainer(
            model=model,
            args=settings,
            train_dataset=examples,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        began = time.perf_counter()
        trainer.train()
        return {"seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sequence-classification")
    parser.add_argument("--data", action="append", type=Path, default=[])
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--judged", type=int, default=500, help="documents to choose by, and as many to confirm on")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--budget", default="standard")
    parser.add_argument("--peft", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peft is not None:
        print(json.dumps(run_peft(arguments, arguments.peft)))
        return
    from rankwise.jobs.machine import processor_name

    found = []
    for data in arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(arguments, data, Path(folder) / "s"))
        print(
            json.dumps({key: value for key, value in found[-1].items() if key != "grid"}), file=sys.stderr, flush=True
        )
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    names = ("rankwise", "torch", "transformers", "peft")
    told = {"model": Path(arguments.model).name, "task": arguments.task, "budget": arguments.budget}
    told |= {name: getattr(arguments, name) for name in ("documents", "judged", "epochs", "lr")}
    print(json.dumps(told | {"machine": machine | {name: version(name) for name in names}, "every": found}, indent=2))


if __name__ == "__main__":
    main()
