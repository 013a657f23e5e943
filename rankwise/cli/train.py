"""`rankwise train`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Json
from rankwise.cli.train_options import parameters
from rankwise.texts import plain


def train(**given: Any) -> None:
    """Train an adapter, or all weights (--form full).

    Ends with a comparison against the base on unseen documents, and a report.

    Examples:
      rankwise train --model ./SmolLM2-135M-Instruct --data chats.jsonl --out runs/chats
      rankwise train --task sequence-classification --model ./bert --data sst2.jsonl --out runs/sst2
      rankwise train --config run.yaml --rank 8 --out runs/rank-8
      rankwise train --form full --model ./SmolLM2-135M-Instruct --data chats.jsonl --out runs/full
      rankwise train --config run.yaml --out runs/chats --resume
    """
    config, quiet = given.pop("config"), given.pop("json")
    _run(config, {name: value for name, value in given.items() if value is not None and value != []}, quiet=quiet)


_JSON = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
train.__signature__ = inspect.Signature([*parameters(), _JSON])  # type: ignore[attr-defined]


def _run(config: Path | None, given: dict[str, Any], *, quiet: bool) -> None:
    from rankwise.jobs.request import TrainRequest, read_config
    from rankwise.jobs.train import run_training

    settings = {**(read_config(config) if config is not None else {}), **given}
    missing = [f"'--{name}'" for name in ("model", "data", "out") if name not in settings]
    if missing:
        raise typer.BadParameter(f"Missing option {', '.join(missing)}.")
    request = TrainRequest(**settings)
    with looking_on(quiet) as watch:
        summary = run_training(request, watch)
        if quiet:
            print_json(summary)
        else:
            show(summary, watch)


def show(summary: dict[str, Any], watch: Any) -> None:
    """The result for people: the verdict, what it took, where things are."""
    training = summary["training"]
    watch.say(f"\n[bold]{plain(summary['verdict'])}[/bold]")
    watch.say(
        f"{training['steps']} steps, {training['tokens']:,} tokens at {training['tokens_per_second']:,.0f} tokens/s, "
        f"{training['peak_memory_bytes'] / 1e9:.2f} GB at most{_expected(training)}; report: {plain(summary['report'])}"
    )


def _expected(training: dict[str, Any]) -> str:
    predicted = training.get("predicted_memory_bytes")
    return f" ({predicted / 1e9:.2f} GB were expected)" if predicted else ""
