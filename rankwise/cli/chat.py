"""`rankwise chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on
from rankwise.cli.options import Force, Json, Model, Storage

_HELP = "/reset forgets what was said, /exit leaves"


def chat(
    model: Model,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Talk to this adapter, not the base.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always gives the likeliest answer.")] = 0.0,
    storage: Storage = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Talk to the base or to an adapter, a line at a time.

    /reset forgets what was said, /exit leaves.  With --json every answer is a JSON object on a line of its own.

    Example:
      rankwise chat --model ./SmolLM2-135M-Instruct --adapter runs/chats
    """
    from rankwise.jobs.chat import Chat

    with looking_on(json) as watch:
        manner: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "storage": storage}
        talk = Chat(model, adapter, watch, force=force, **manner)
        watch.say(_HELP)
        _converse(talk, json)


def _converse(talk: Any, as_json: bool) -> None:
    import json
    import sys

    while True:
        try:
            line = input("" if as_json or not sys.stdin.isatty() else "> ").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            talk.reset()
        elif as_json and line:
            print(json.dumps({"role": "assistant", "content": talk.reply(line)}, ensure_ascii=False), flush=True)
        elif line:
            talk.reply(line, say=lambda text: print(text, end="", flush=True))
            print()
