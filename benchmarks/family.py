"""What each form, rate and storage costs beside plain LoRA in bfloat16: seconds of a step, and bytes of weights.

    python benchmarks/family.py --model DIR --data TRAIN.jsonl [--steps 10] [--rounds 3]

Every side trains a fresh adapter, r = 16 on all linear layers, on the same documents in the same order, steps of at
most 2,048 tokens, in one process; sides take turns, round after round, each round beginning with another one.  A step
is held against the same step of LoRA in the same round, and the first step of every side is left out.  Prints one JSON
object with the medians of these ratios.  AdaLoRA has all its rank in the first half of the steps, a quarter of it in
the second, and a ratio for each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from where import machine

from rankwise.adapters.presets import TARGET_ROLES
from rankwise.adapters.spec import LoraSpec
from rankwise.data.prepare import prepare
from rankwise.data.template import Template
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Pruning, Run
from rankwise.frozen.load import Base, load_base
from rankwise.kernels.heap import begin_anew
from rankwise.kernels.sizes import Storage
from rankwise.surgery.bank import Bank
from rankwise.surgery.sites import find_sites

RANK, TOKENS = 16, 2048
SIDES: dict[str, tuple[Storage, dict[str, Any], dict[str, Any]]] = {
    "lora": ("dense", {}, {}),
    "rslora": ("dense", {"scaling": "alpha/sqrt(r)"}, {}),
    "lora+": ("dense", {}, {"lr_ratio": 16}),
    "dora": ("dense", {"form": "dora"}, {}),
    "adalora": (
        "dense",
        {"form": "adalora"},
        {"pruning": Pruning(target_rank=RANK // 4, begin=0.4, settle=0.5, every=1)},
    ),
    "int8": ("int8", {}, {}),
    "nf4": ("nf4", {}, {}),
}


def steps_of(base: Base, corpus: Any, side: str, steps: int) -> list[float]:
    """Seconds of each optimiser step."""
    _, spec, run = SIDES[side]
    seconds: list[float] = []

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            seconds.append(event["seconds"])

    with Bank(base.model) as bank:
        bank.add("a", LoraSpec(rank=RANK, alpha=2 * RANK, targets="all-linear", **spec))
        loop = Loop(batch_tokens=TOKENS, max_steps=steps)
        train(bank, {"a": Run(lr=2e-4, warmup=0, **run)}, corpus, loop=loop, observe=observe)
    return seconds


def weight_bytes(base: Base) -> int:
    """Of the linear layers in the blocks, however they are held."""
    layers = [site.module for site in find_sites(base.model).values() if site.role in TARGET_ROLES["all-linear"]]
    held = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def over_lora(found: dict[str, list[list[float]]], side: str, steps: slice) -> float:
    """The median of a side's steps over LoRA's, each beside the same one."""
    pairs = zip(found[side], found["lora"], strict=True)
    return statistics.median(
        own / lora for one, other in pairs for own, lora in zip(one[steps], other[steps], strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    bases = {name: load_base(arguments.model, storage=name) for name in ("dense", "int8", "nf4")}
    held = {name: weight_bytes(base) for name, base in bases.items()}
    template = Template(bases["dense"].tokenizer)
    corpus = prepare(arguments.data, template, TOKENS).corpus
    corpus = corpus.subset(range(min(len(corpus), 10 * arguments.steps)))
    found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    names = list(SIDES)
    for number in range(arguments.rounds):
        turn = 3 * number % len(names)
        for side in names[turn:] + names[:turn]:
            found[side].append(steps_of(bases[SIDES[side][0]], corpus, side, arguments.steps))
            said = statistics.median(found[side][-1])
            print(side, round(said, 3), "load", os.getloadavg()[0], file=sys.stderr, flush=True)
    half = round(0.4 * arguments.steps)
    result = {
        "what": f"optimiser step of at most {TOKENS} tokens, r = {RANK} all-linear",
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).parent.name,
        "machine": machine() | {"threads": torch.get_num_threads()},
        "precision": str(bases["dense"].precision.dtype),
        "rounds": arguments.rounds,
        "seconds": {side: statistics.median(step for one in own for step in one[1:]) for side, own in found.items()},
        "over_lora": {
            **{side: over_lora(found, side, slice(1, None)) for side in SIDES if side != "adalora"},
            "adalora at its starting rank": over_lora(found, "adalora", slice(1, half)),
            "adalora at a quarter of it": over_lora(found, "adalora", slice(half + 1, None)),
        },
        "linear_weights_over_dense": {name: size / held["dense"] for name, size in held.items()},
        "every": found,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    begin_anew()
    main()
