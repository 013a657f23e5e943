"""`rankwise merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Adapter, Force, Json, Model, Rank


def merge(
    model: Model,
    adapter: Adapter,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the merged model; must be new or empty.")],
    rank: Rank = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Merge an adapter into its base, proved on logits.

    Added in float32 and rounded once; the written model is read back and compared before it is said to be done.

    Example:
      rankwise merge --model ./SmolLM2-135M-Instruct --adapter runs/chats --out merged
    """
    from rankwise.jobs.merge import run_merge

    with looking_on(json) as watch:
        found = run_merge(model, adapter, out, watch, rank=rank, force=force)
        if json:
            print_json(found)
        else:
            rows = f" and rows of {found['tokens']} tokens" if found["tokens"] else ""
            print(
                f"{found['out']}: {found['layers']} layers{rows} merged, stored as {found['dtype']}; logits differ "
                f"from base + adapter by {found['logits_error']:.2g} on {found['prompts']} prompts "
                f"({found['tolerance']:g} allowed)"
            )
