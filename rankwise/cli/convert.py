"""`rankwise convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Json

Source = Annotated[
    Path,
    typer.Argument(metavar="SOURCE", help="Of PEFT, llama.cpp, diffusers, kohya, mlx-lm or loralib; a folder or file."),
]
Server = Annotated[
    str | None,
    typer.Option("--for", help="vllm: a folder of PEFT as vLLM takes it, and with which options.", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="PATH_OR_ID",
        help="Base model, to check against; gguf needs it [the one that the adapter names].",
        show_default=False,
    ),
]
Enabled = Annotated[
    str | None,
    typer.Option(
        help="Of loralib's merged layers: which parts have factors [true,false,true where there are two].",
        show_default=False,
    ),
]


def convert(
    source: Source,
    out: Annotated[Path, typer.Option(metavar="PATH", help="A folder for peft and mlx, else a file; must be new.")],
    to: Annotated[str | None, typer.Option(help="peft, gguf, diffusers, kohya or mlx.", show_default=False)] = None,
    serve: Server = None,
    model: Base = None,
    component: Annotated[
        str,
        typer.Option(
            help="Which model of a diffusion pipeline, such as unet [as the layers tell].", show_default=False
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="Of what is written: f32, f16 or bf16.")] = "f32",
    alpha: Annotated[
        float | None, typer.Option(help="Of loralib's files, which do not say it: lora_alpha.", show_default=False)
    ] = None,
    enable_lora: Enabled = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Of the plain LoRA that stands for a DoRA with --for vllm [the next vLLM has].", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write an adapter in another tool's format.

    The format of SOURCE is found out by looking.  What the other format cannot hold is an error that lists all of it;
    what is written is read back, and how far ΔW is off is printed.

    Examples:
      rankwise convert runs/chats --to gguf --model ./SmolLM2-135M-Instruct --out chats.gguf
      rankwise convert runs/chats --for vllm --out served/chats
      rankwise convert roberta_base_lora_mnli.bin --to peft --alpha 16 --out runs/mnli
    """
    from rankwise.formats.loralib import enabled_parts
    from rankwise.jobs.convert import Conversion, run_conversion

    asked = Conversion(model, component, alpha, enabled_parts(enable_lora), serve, rank, dtype)
    with looking_on(json) as watch:
        found = run_conversion(source, to, out, watch, asked)
        if json:
            print_json(found)
        else:
            _show(found)


def _show(found: dict[str, Any]) -> None:
    ranks = sorted(set(found["ranks"].values()))
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no factors"
    of = f" of {found['component']}" if found["component"] else ""
    print(f"{found['out']}: {found['layers']} layers{of}, {span}, {found['parameters']:,} parameters")
    print(f"{found['from']} → {found['to']}; {_told(found['error'])}")
    for note in found["notes"]:
        print(f"note: {note}")
    if found["errors"]:
        table = ", ".join(f"{rank}: {_share(value)}" for rank, value in found["errors"].items())
        print(f"DoRA became plain LoRA; by --rank ΔW is off by {table}")
    print("use it:")
    for command in found["use"]:
        print(f"  {command}")


def _told(error: float) -> str:
    return "ΔW is the same" if error < 1e-12 else f"ΔW is off by {_share(error)} of its norm"


def _share(error: float) -> str:
    return f"{error:.2g}" if error < 1e-4 else f"{error:.2%}"
