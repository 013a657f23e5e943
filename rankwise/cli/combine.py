"""`rankwise combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Device, Dtype, Force, Json, MaxLength, Model, Storage


def combine(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Their folders, ours or PEFT's.")],
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the combined adapter; must be new or empty.")],
    method: Annotated[
        str, typer.Option(help="cat, svd, linear, ties, dare, dare-ties or knots; cat is the sum, exactly.")
    ] = "cat",
    weights: Annotated[
        str | None, typer.Option(help="One for each, such as 0.7,-0.3; 0 leaves one out [1 each].", show_default=False)
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Of svd, ties, dare, dare-ties and knots [the adapters' largest].", show_default=False),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of entries kept [ties 0.2, dare and dare-ties 0.5, knots 1].", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare and dare-ties [0].", show_default=False)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Evaluate on it: base, every adapter, the combined one; may be repeated, each by itself.",
            show_default=False,
        ),
    ] = None,
    max_length: MaxLength = None,
    dtype: Dtype = "auto",
    storage: Storage = None,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Make one adapter of several of the same base.

    Ranks, alphas, scalings and layers may differ.  What is lost on the way is printed, and the command that measures
    what each task loses; with --data that is done at once.

    Examples:
      rankwise combine runs/chats runs/code --model ./SmolLM2-135M-Instruct --out runs/both
      rankwise combine runs/a runs/b --model ./m --weights 0.7,0.3 --method svd --rank 16 --out runs/ab --data t.jsonl
    """
    from rankwise.adapters.recipe import Recipe
    from rankwise.jobs.combine import run_combination

    asked: dict[str, Any] = {"method": method, "weights": weights, "rank": rank, "density": density, "seed": seed}
    reading = {"max_length": max_length, "dtype": dtype, "storage": storage, "device": device}
    with looking_on(json) as watch:
        recipe = Recipe(**{name: value for name, value in asked.items() if value is not None})
        found = run_combination(model, adapters, out, watch, recipe, data=data or (), force=force, **reading)
        if json:
            print_json(found)
        else:
            _show(found, watch)


def _show(found: dict[str, Any], watch: Any) -> None:
    from rankwise.cli.evaluate import show_evaluation

    for table in found["evaluations"]:
        print(f"{table['data']}:")
        show_evaluation(table, watch)
    ranks = sorted(set(found["ranks"].values()))
    summands = " + ".join(f"{weight:g} × {name}" for name, weight in found["weights"].items())
    print(f"{found['out']}: {found['method']} of {summands.replace('+ -', '- ')}")
    print(found["makes"])
    if ranks:
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        print(f"{len(found['ranks'])} layers, {span}, {found['parameters']:,} parameters")
    if found["chosen"]:
        print(f"chosen: {'; '.join(f'{name} {why}' for name, why in found['chosen'].items())}")
    if found["error"]:
        worst = max(found["errors"], key=found["errors"].get)
        far = "its ΔW is off the sum" if found["method"] == "linear" else "cut to these ranks, ΔW is off"
        print(f"{far} by {found['error']:.2%} of its norm; most at {worst}, {found['errors'][worst]:.2%}")
    for path, names in found["taken"].items():
        print(f"{path}: taken as it is from {' and '.join(names)}, whatever the weight")
    if found["evaluations"]:
        return
    print("what each task loses, measured on documents that none of them was trained on:")
    for one in found["evaluate"]:
        print(f"  {one['command']}")
    unknown = [name for one in found["evaluate"] if one["data"] is None for name in one["of"]]
    if unknown:
        print(f"UNSEEN is for you to name: what {' and '.join(unknown)} could be measured on is not recorded")
