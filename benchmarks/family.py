"""What each form and rate costs beside plain LoRA: seconds of an optimiser step, on the same documents in one process.

    python benchmarks/family.py --model DIR --data TRAIN.jsonl [--documents 40] [--steps 3] [--rounds 5]

Every side trains a fresh adapter, r = 16 on all linear layers, for a few steps of 8 documents; sides take turns,
round after round, each round beginning with another one.  Prints one JSON object: for every side the median over rounds
of its median step, and the median over rounds of the ratio to LoRA in that round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rankwise.adapters.spec import LoraSpec
from rankwise.data.prepare import prepare
from rankwise.data.template import Template
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.frozen.load import load_base
from rankwise.jobs.machine import processor_name
from rankwise.surgery.bank import Bank

SIDES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "rslora": ({"scaling": "alpha/sqrt(r)"}, {}),
    "lora+": ({}, {"lr_ratio": 16}),
    "dora": ({"form": "dora"}, {}),
}


def steps_of(model: Any, corpus: Any, side: str, steps: int) -> list[float]:
    """Seconds of each optimiser step but the first."""
    spec, run = SIDES[side]
    seconds: list[float] = []

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            seconds.append(event["seconds"])

    with Bank(model) as bank:
        bank.add("a", LoraSpec(rank=16, alpha=32, targets="all-linear", **spec))
        loop = Loop(batch_documents=8, max_steps=steps + 1)
        train(bank, {"a": Run(lr=2e-4, warmup=0, **run)}, corpus, loop=loop, observe=observe)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    base = load_base(arguments.model)
    corpus = prepare(arguments.data, Template(AutoTokenizer.from_pretrained(arguments.model)), 2048).corpus
    corpus = corpus.subset(range(min(len(corpus), arguments.documents)))
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    names = list(SIDES)
    for number in range(arguments.rounds):
        turn = number % len(names)
        for side in names[turn:] + names[:turn]:
            found[side].append(statistics.median(steps_of(base.model, corpus, side, arguments.steps)))
            print(side, round(found[side][-1], 3), "load", os.getloadavg()[0], file=sys.stderr, flush=True)
    ratios = {
        side: statistics.median(own / lora for own, lora in zip(found[side], found["lora"], strict=True))
        for side in SIDES
    }
    result = {
        "what": "optimiser step of 8 documents, r = 16 all-linear",
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).parent.name,
        "tokens": len(corpus.tokens),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("rankwise", "torch", "transformers")},
        },
        "precision": str(base.precision.dtype),
        "rounds": arguments.rounds,
        "seconds": {side: statistics.median(own) for side, own in found.items()},
        "over_lora": ratios,
        "every": found,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
