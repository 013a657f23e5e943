"""`rankwise evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Data, Device, Dtype, Force, Json, Model, Storage


def evaluate(
    model: Model,
    data: Data,
    adapter: Annotated[
        list[Path], typer.Option("--adapter", metavar="DIR", help="An adapter's folder; may be repeated.")
    ],
    max_length: Annotated[
        int | None, typer.Option(help="Longest document, in tokens [as in training, else 2048].", show_default=False)
    ] = None,
    overlong: Annotated[
        str | None, typer.Option(help="Longer ones: truncate or drop [as in training].", show_default=False)
    ] = None,
    train_on: Annotated[
        str | None, typer.Option(help="Answers that count: all or last [as in training].", show_default=False)
    ] = None,
    dtype: Dtype = "auto",
    storage: Storage = None,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare adapters with their base on the same documents.

    Differences are paired by document and have 95 % intervals.

    Example:
      rankwise evaluate --model ./SmolLM2-135M-Instruct --data test.jsonl --adapter runs/a --adapter runs/b
    """
    from rankwise.jobs.evaluate import run_evaluation
    from rankwise.jobs.plan_text import left_out

    asked: dict[str, Any] = {"max_length": max_length, "overlong": overlong, "train_on": train_on, "storage": storage}
    with looking_on(json) as watch:
        found = run_evaluation(model, adapter, data, watch, dtype=dtype, device=device, force=force, **asked)
        if json:
            print_json(found)
            return
        watch.say(f"{found['documents']:,} documents, {found['tokens']:,} supervised tokens; nats per token")
        for words in left_out(found):
            watch.say(f"  {words}")
        width = max(len(one["name"]) for one in [{"name": "base"}, *found["adapters"]])
        print(f"{'base':{width}}  {found['base']['loss']:.4f}")
        for one in found["adapters"]:
            delta = one["delta"]
            print(
                f"{one['name']:{width}}  {one['loss']:.4f}  difference {delta['mean']:+.4f} "
                f"(95 % {delta['low']:+.4f} … {delta['high']:+.4f})"
            )
