"""Many adapters trained side by side on one base against the same ones trained one after another.

    python benchmarks/packed.py --model DIR --data TRAIN.jsonl [--adapters 8] [--tokens 256] [--steps 12] [--rounds 3]

r = 16 on all linear layers, the same documents in the same order for all, steps of at most so many tokens for each
adapter.  Two sides, each in its own process, in turn: `packed` trains all of them, `alone` one of them, which for all
of them takes so many times as long, and so many times as much memory if they ran at once.  Losses of the adapter that
both sides train are held against each other.  Prints one JSON object; the goals for 8 adapters and 256 tokens are 0.75
times the time and 0.35 times the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from where import machine

from rankwise.kernels.heap import without_thread_cache

SIDES = ("packed", "alone")
RANK = 16


def run(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from rankwise.adapters.spec import LoraSpec
    from rankwise.data.prepare import prepare
    from rankwise.data.template import Template
    from rankwise.engine.loop import train
    from rankwise.engine.run import Loop, Run
    from rankwise.frozen.load import load_base
    from rankwise.jobs.machine import peak_memory_bytes
    from rankwise.surgery.bank import Bank

    base = load_base(arguments.model)
    corpus = prepare(arguments.data, Template(base.tokenizer), arguments.tokens).corpus
    names = [f"a{number}" for number in range(arguments.adapters if side == "packed" else 1)]
    seconds: dict[int, float] = {}
    losses: list[float] = []

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            seconds[event["step"]] = event["seconds"]  # that of the last adapter is the whole step's
            if event["adapter"] == "a0":
                losses.append(event["loss"])

    with Bank(base.model) as bank:
        for number, name in enumerate(names):
            bank.add(name, LoraSpec(rank=RANK, alpha=2 * RANK, targets="all-linear"), seed=number)
        loop = Loop(batch_tokens=arguments.tokens, max_steps=arguments.steps)
        train(bank, {name: Run(lr=2e-4, warmup=0) for name in names}, corpus, loop=loop, observe=observe)
    return {"seconds": list(seconds.values()), "losses": losses, "peak_bytes": peak_memory_bytes()}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            done = subprocess.run(
                [sys.executable, *sys.argv, "--side", side],
                capture_output=True,
                text=True,
                check=False,
                env=without_thread_cache(os.environ),
            )
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, statistics.median(found[side][-1]["seconds"]), file=sys.stderr, flush=True)
    seconds = {side: statistics.median(s for one in found[side] for s in one["seconds"][1:]) for side in SIDES}
    peak = {side: statistics.median(one["peak_bytes"] for one in found[side]) for side in SIDES}
    pairs = [
        abs(one / other - 1)
        for packed, alone in zip(found["packed"], found["alone"], strict=True)
        for one, other in zip(packed["losses"], alone["losses"], strict=True)
    ]
    return {
        "what": f"{arguments.adapters} adapters, r = {RANK} all-linear, {arguments.tokens} tokens each a step",
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).parent.name,
        "machine": machine(),
        "rounds": arguments.rounds,
        "seconds_a_step": seconds,
        "peak_gb": {side: bytes_ / 1e9 for side, bytes_ in peak.items()},
        "ratios": {
            "time": seconds["packed"] / (arguments.adapters * seconds["alone"]),
            "memory": peak["packed"] / (arguments.adapters * peak["alone"]),
        },
        "largest_difference_of_losses": max(pairs),
        "every": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is None:
        print(json.dumps(compare(arguments), indent=2))
    else:
        print(json.dumps(run(arguments.side, arguments)))


if __name__ == "__main__":
    main()
