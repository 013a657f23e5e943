"""What `rankwise serve` says while it serves."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankwise.errors import MissingPackageError, SpecError, listing

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_MOST = 10  # adapters that are named


def serving(named: Sequence[str], asked: dict[str, Any], watch: Any, *, as_json: bool) -> None:
    """Serves until somebody ends it.

    Raises:
        MissingPackageError: what serving needs is not installed.
        SpecError: `named` are not all NAME=DIR.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"serving needs {', '.join(missing)}", hint="pip install 'rankwise[serve]'")
    from rankwise.serving.service import ServeRequest, Service

    service = Service(ServeRequest(adapters=folders(named), **asked), watch)

    def ready(told: dict[str, Any]) -> None:
        if as_json:
            import json

            print(json.dumps(told, ensure_ascii=False), flush=True)
        else:
            print(_words(told), flush=True)

    service.run(ready)
    watch.say("stopped")


def folders(named: Sequence[str]) -> dict[str, Path]:
    """Folders by the names they were given as NAME=DIR.

    Raises:
        SpecError: lists what is not of this form, or there twice.
    """
    found: dict[str, Path] = {}
    problems = []
    for text in named:
        name, sign, folder = text.partition("=")
        if not (name and sign and folder):
            problems.append(f"{text!r} is not NAME=DIR")
        elif name in found:
            problems.append(f"{name!r} is there twice")
        else:
            found[name] = Path(folder).expanduser()
    if problems:
        raise SpecError(f"--adapter:\n{listing(problems)}", hint="--adapter chats=runs/chats")
    return found


def _words(told: dict[str, Any]) -> str:
    names = told["adapters"]
    rest = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    shown = ", ".join(names[:_MOST]) + rest if names else "none; the base alone"
    model = names[0] if names else told["base"]
    key = " -H 'Authorization: Bearer '\"$RANKWISE_API_KEY\"" if told["key"] else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    lines = [
        f"serving on {told['url']}",
        f"  base      {told['base'] or 'not by itself'}",
        f"  adapters  {shown}{' (merged)' if told['merged'] else ''}",
        f"  try       curl {told['url']}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        "Ctrl-C ends it.",
    ]
    return "\n".join(lines)
