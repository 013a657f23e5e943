"""`rankwise quickstart`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Json
from rankwise.texts import plain


def quickstart(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for data and run; must be new or empty.")] = Path(
        "quickstart"
    ),
    model: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="Another base model than the packaged SmolLM2-135M.")
    ] = None,
    search: Annotated[
        bool, typer.Option(help="Measure rate and rank first; without, half the time and no evidence for either.")
    ] = True,
    json: Json = False,
) -> None:
    """Tune a small real model on real data, in minutes.

    The data are Python functions on this machine.  Learning rate and rank are measured, an adapter is trained with
    them, and the end is a comparison with the base on functions that it has not seen.

    Example:
      rankwise quickstart
    """
    from rankwise.cli.train import show
    from rankwise.jobs.quickstart import run_quickstart

    with looking_on(json) as watch:
        found = run_quickstart(out, watch, model, search=search)
        if json:
            print_json(found)
            return
        _show_samples(found["samples"], watch)
        show(found, watch)
        base, run, data, merged = (quote(str(path)) for path in (found["model"], found["out"], found["data"], out))
        watch.say("\n[bold]to try next[/bold]")
        searched = found["search"]
        why = f"  open {searched['report']} for why this rate and this rank\n" if searched is not None else ""
        watch.say(
            plain(
                f"  open {found['report']} in a browser\n{why}"
                f"  rankwise chat --model {base} --adapter {run}\n"
                f"  rankwise evaluate --model {base} --adapter {run} --data {data}/test.jsonl\n"
                f"  rankwise inspect {run}\n"
                f"  rankwise merge --model {base} --adapter {run} --out {merged}/merged\n"
                f"  rankwise train --model {base} --data YOUR.jsonl --out runs/mine"
            )
        )


def _show_samples(samples: list[dict[str, str]], watch: Any) -> None:
    for sample in samples:
        code = sample["prompt"].split("```")
        shown = code[1].removeprefix("python").strip() if len(code) > 1 else sample["prompt"]
        watch.say(f"\n[dim]{plain(shown)}[/dim]")
        for title, colour in (("before", "yellow"), ("after", "green"), ("reference", "white")):
            watch.say(f"[bold {colour}]{title:9}[/bold {colour}] {plain(sample[title])}")
