"""`rankwise`: the verbs, and what happens when one fails.

Verbs import their work when they run, so that `--help` starts at once.
"""

from __future__ import annotations

import json
import sys

import typer

from rankwise.cli.chat import chat
from rankwise.cli.doctor import doctor
from rankwise.cli.evaluate import evaluate
from rankwise.cli.inspect import inspect
from rankwise.cli.merge import merge
from rankwise.cli.quickstart import quickstart
from rankwise.cli.train import train
from rankwise.errors import RankwiseError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: a quarter of a second sooner
    pretty_exceptions_enable=False,
    help="LoRA in which rank, alpha, learning rate and targets are measured, not guessed.",
)
for verb in (quickstart, train, evaluate, chat, merge, inspect, doctor):
    app.command()(verb)


def main() -> None:
    """The entry point: a person's mistakes end in a sentence and a way out, never in a traceback.

    Exit codes: 0 done, 1 a mistake or a failure, 2 wrong usage, 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    try:
        app()
    except RankwiseError as error:
        _tell(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _tell(error: RankwiseError) -> None:
    if "--json" in sys.argv:
        found = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(f"error: {error}", file=sys.stderr)
