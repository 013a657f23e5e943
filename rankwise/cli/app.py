"""`rankwise`: the verbs, and what happens when one fails.

Verbs import their work when they run, so that `--help` starts at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from inspect import cleandoc
from typing import TextIO

import typer

from rankwise.cli.chat import chat
from rankwise.cli.combine import combine
from rankwise.cli.compress import compress
from rankwise.cli.convert import convert
from rankwise.cli.doctor import doctor
from rankwise.cli.evaluate import evaluate
from rankwise.cli.inspect import inspect
from rankwise.cli.merge import merge
from rankwise.cli.plan import plan
from rankwise.cli.quickstart import quickstart
from rankwise.cli.search import search
from rankwise.cli.serve import serve
from rankwise.cli.train import train
from rankwise.engine.interrupt import Interrupt, Interrupted
from rankwise.errors import RankwiseError, RankwiseWarning

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: a quarter of a second sooner
    pretty_exceptions_enable=False,
    help="LoRA in which rank, alpha, learning rate and targets are measured, not guessed.",
)


def _help(verb: Callable[..., None]) -> str:
    """A verb's docstring with click's mark before the examples, so that they keep their lines."""
    return re.sub("^(?=Examples?:$)", "\b\n", cleandoc(verb.__doc__ or ""), flags=re.M)


for verb in (
    quickstart,
    search,
    train,
    evaluate,
    chat,
    serve,
    merge,
    combine,
    compress,
    convert,
    inspect,
    plan,
    doctor,
):
    app.command(help=_help(verb))(verb)


def main() -> None:
    """The entry point: a person's mistakes end in a sentence and a way out, never in a traceback.

    Exit codes: 0 done, 1 a mistake or a failure, 2 wrong usage, 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    try:
        code = _run()
        print(end="", flush=True)
    except OSError as error:  # a full disk, a file that may not be touched, a reader who has seen enough
        code = 1
        if not isinstance(error, BrokenPipeError):
            print(f"error: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter tries again, and complains
    sys.exit(code)


def _run() -> int:
    try:
        with Interrupt(at_once=True), warnings.catch_warnings():
            warnings.showwarning = _show
            app()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except RankwiseError as error:
        _tell(error)
        return 1
    except Interrupted as stop:
        print(f"stopped{stop.way_on}", file=sys.stderr)
        return 128 + stop.number
    return 0


def _tell(error: RankwiseError) -> None:
    if "--json" in sys.argv:
        found = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(f"error: {error}", file=sys.stderr)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are sentences for people; with others it matters where they come from."""
    ours = issubclass(category, RankwiseWarning)
    text = f"warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)
