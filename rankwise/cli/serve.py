"""`rankwise serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on
from rankwise.cli.options import Device, Dtype, Force, Json, Model, Storage

Named = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=DIR", help="Serve this adapter by this name; may be repeated."),
]
Folder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Serve the adapters in it by their folders' names; others may be loaded from it."),
]
Waiting = Annotated[int, typer.Option(min=1, help="Answers that may wait before others get a 429.")]
Key = Annotated[
    str | None,
    typer.Option(envvar="RANKWISE_API_KEY", show_envvar=False, help="Asked of everybody; or RANKWISE_API_KEY."),
]


def serve(
    model: Model,
    adapter: Named = None,
    adapters_dir: Folder = None,
    host: Annotated[str, typer.Option(help="Address; one that others can reach needs --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Key = None,
    max_loaded: Annotated[int, typer.Option(min=1, help="Adapters in memory at once; others wait on the disk.")] = 32,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step of the engine.")] = 2048,
    max_waiting: Waiting = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 4096,
    cache: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Memory of keys and values [a quarter of what is free].", show_default=False),
    ] = None,
    merge: Annotated[
        str | None, typer.Option(metavar="NAME", help="Merge this adapter into the base and serve it alone.")
    ] = None,
    allow_any_path: Annotated[
        bool, typer.Option("--allow-any-path", help="Adapters loaded over HTTP may lie outside --adapters-dir.")
    ] = False,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that answers may take to end after SIGTERM.")] = 30.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    storage: Storage = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Serve a base and any number of adapters over HTTP.

    OpenAI's /v1/models, /v1/chat/completions and /v1/completions; the adapter is the model's name.  With --json one
    line says what is served, once it is.  SIGTERM and Ctrl-C let answers end.

    Example:
      rankwise serve --model ./SmolLM2-135M-Instruct --adapter chats=runs/chats --port 8000
    """
    from rankwise.cli.served import serving

    asked: dict[str, Any] = {
        "model": model,
        "adapters_dir": adapters_dir,
        "allow_any_path": allow_any_path,
        "merge": merge,
        "host": host,
        "port": port,
        "api_key": api_key,
        "max_loaded": max_loaded,
        "max_batch_tokens": max_batch_tokens,
        "max_waiting": max_waiting,
        "max_tokens": max_tokens,
        "cache_bytes": None if cache is None else int(cache * 2**30),
        "drain": drain,
        "dtype": dtype,
        "device": device,
        "storage": storage,
        "force": force,
    }
    with looking_on(json) as watch:
        serving(adapter or [], asked, watch, as_json=json)
