"""Options that several verbs share, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", metavar="PATH_OR_ID", help="Base model: a folder, or an id on the hub.")]
Data = Annotated[
    list[str],
    typer.Option(
        "--data", metavar="FILE", help="JSONL, JSON, CSV or Parquet, or a hub data set's name; may be repeated."
    ),
]
Adapter = Annotated[Path, typer.Option("--adapter", metavar="DIR", help="An adapter's folder, ours or PEFT's.")]
Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Of a nested adapter, the rank to use it at [its own].", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Go on though the base or its chat template is another.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Longest document, in tokens [as in training, else 2048; 512 for encoders and seq2seq].",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
Storage = Annotated[
    str | None,
    typer.Option("--storage", help="How the base is held: dense, int8 or nf4 [as in training].", show_default=False),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]
