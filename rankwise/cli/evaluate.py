"""`rankwise evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Data, Device, Dtype, Force, Json, MaxLength, Model, Storage


def evaluate(
    model: Model,
    data: Data,
    adapter: Annotated[
        list[Path],
        typer.Option(
            "--adapter", metavar="DIR", help="An adapter's folder, or a model's of train --form full; may be repeated."
        ),
    ],
    task: Annotated[str | None, typer.Option(help="What for [as in training].", show_default=False)] = None,
    max_length: MaxLength = None,
    overlong: Annotated[
        str | None, typer.Option(help="Longer ones: truncate or drop [as in training].", show_default=False)
    ] = None,
    train_on: Annotated[
        str | None, typer.Option(help="Answers that count: all or last [as in training].", show_default=False)
    ] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(
            "--rank", min=1, help="Of nested adapters, ranks to measure them at; may be repeated [their own]."
        ),
    ] = None,
    dtype: Dtype = "auto",
    storage: Storage = None,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare adapters with their base on the same documents.

    Models of train --form full are compared beside them.  Differences are paired by document and have 95 % intervals.

    Example:
      rankwise evaluate --model ./SmolLM2-135M-Instruct --data test.jsonl --adapter runs/a --adapter runs/b
    """
    from rankwise.jobs.evaluate import run_evaluation

    reading = {"task": task, "max_length": max_length, "overlong": overlong, "train_on": train_on, "storage": storage}
    with looking_on(json) as watch:
        found = run_evaluation(
            model, adapter, data, watch, ranks=rank or (), dtype=dtype, device=device, force=force, **reading
        )
        if json:
            print_json(found)
            return
        show_evaluation(found, watch)


def show_evaluation(found: dict[str, Any], watch: Any) -> None:
    """The table, as `combine --data` shows it too."""
    from rankwise.jobs.plan_text import left_out
    from rankwise.tasks import TASKS

    task = TASKS[found["task"]]
    judged = "" if task.classifies else f", {found['tokens']:,} {task.item}s"
    watch.say(f"{found['documents']:,} documents{judged}; nats per {task.unit}")
    for words in left_out(found):
        watch.say(f"  {words}")
    base = found.get("reference", "base")
    width = max(len(one) for one in (base, *(one["name"] for one in found["adapters"])))
    print(f"{base:{width}}  {found['base']['loss']:.4f}{_accuracy(found['base'])}")
    for one in found["adapters"]:
        delta = one["delta"]
        print(
            f"{one['name']:{width}}  {one['loss']:.4f}  difference {delta['mean']:+.4f} "
            f"(95 % {delta['low']:+.4f} … {delta['high']:+.4f}){_accuracy(one)}"
        )


def _accuracy(one: dict[str, Any]) -> str:
    """Of a base or an adapter, where there are classes."""
    if "accuracy" not in one:
        return ""
    accuracy, delta = one["accuracy"], one.get("accuracy_delta")
    told = f"  accuracy {accuracy['value']:.1%} ({accuracy['low']:.1%} … {accuracy['high']:.1%})"
    told += f", macro-F1 {one['macro_f1']:.3f}"
    return told if delta is None else f"{told}, McNemar p {delta['mcnemar_p']:.2g}"
