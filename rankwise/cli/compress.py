"""`rankwise compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Data, Device, Dtype, Force, Json, MaxLength, Model, Storage


def compress(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Its folder, ours or PEFT's.")],
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the smaller adapter; must be new or empty.")],
    tolerance: Annotated[
        str, typer.Option(help="How much worse it may be: a share of its gain (2%) or nats per token (0.003).")
    ] = "2%",
    worth: Annotated[str, typer.Option(help="What counts for a part: fisher, activations or plain.")] = "fisher",
    max_length: MaxLength = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the split in halves [as in training, else 0].", show_default=False)
    ] = None,
    dtype: Dtype = "auto",
    storage: Storage = None,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Make an adapter smaller where that is shown to do no harm.

    Half of the documents choose a size, the other half decide.  The ranks that are left differ from layer to layer.

    Example:
      rankwise compress runs/chats --model ./SmolLM2-135M-Instruct --data unseen.jsonl --out runs/small
    """
    from rankwise.jobs.compress import run_compression

    settings: dict[str, Any] = {"tolerance": tolerance, "worth": worth, "dtype": dtype, "device": device}
    reading: dict[str, Any] = {"max_length": max_length, "seed": seed, "storage": storage}
    with looking_on(json) as watch:
        found = run_compression(model, adapter, data, out, watch, force=force, **settings, **reading)
        if json:
            print_json(found)
        else:
            _show(found)


def _show(found: dict[str, Any]) -> None:
    before, after = (found["parameters"][which] for which in ("whole", "compressed"))
    losses, delta = found["losses"], found["delta"]
    ranks = sorted(found["ranks"].values())
    for name in ("base", "whole", "compressed"):
        print(f"{name:10}  {losses[name]:.4f}")
    share = f"{after:,} of {before:,} parameters ({after / before:.0%})"
    print(f"{found['out']}: {share}, ranks {ranks[0]} to {ranks[-1]} at {len(ranks)} layers")
    print(
        f"difference to the whole adapter {delta['mean']:+.4f}, with 95 % confidence at most {delta['high']:+.4f}; "
        f"{found['tolerance']:.4f} were allowed ({found['documents']['second']} documents decided)"
    )
    print(f"report: {found['report']}")
