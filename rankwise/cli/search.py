"""`rankwise search`."""

from __future__ import annotations

import inspect
from copy import copy
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Json
from rankwise.cli.train_options import parameters
from rankwise.texts import plain

_OWN = ("budget", "ranks", "also", "allocate", "pack", "until", "engine", "ray_address", "workers")
# What a search finds itself, or has no use for.
_LEFT_OUT = (
    *(
        "scenario",
        "continue_from",
        "keep_optimiser",
        "onto",
        "replay",
        "force",
        "track",
        "rank_pattern",
        "alpha_pattern",
        "add_tokens",
        "nested",
    ),
    *("patience", "evaluate_every", "save_every"),
)


def search(**given: Any) -> None:
    """Find learning rate, layers and rank by measurement.

    Many adapters are trained on one base; answers come with intervals, or as "cannot tell".  Ends with the adapter, a
    report, and the train command for it.  --lr is the middle of the ladder of rates, --rank that at which rates are
    compared, --alpha that of all ranks.  Killed, it goes on with --resume.

    Examples:
      rankwise search --model ./SmolLM2-135M-Instruct --data chats.jsonl --out runs/search
      rankwise search --model ./bert --task sequence-classification --data sst2.jsonl --out runs/s --budget express
      rankwise search --model ./m --data a.jsonl --valid b.jsonl --test c.jsonl --out runs/s --also form=dora
      rankwise search --model ./m --data a.jsonl --out runs/s --allocate gradients
    """
    config, quiet = given.pop("config"), given.pop("json")
    told = {name: value for name, value in given.items() if value is not None and value != []}
    _run(config, {name: told.pop(name) for name in _OWN if name in told}, told, quiet=quiet)


def _run(config: Path | None, own: dict[str, Any], given: dict[str, Any], *, quiet: bool) -> None:
    from rankwise.jobs.request import TrainRequest, read_config
    from rankwise.jobs.search import SearchRequest, run_search

    settings = {**(read_config(config) if config is not None else {}), **given}
    asked = {name: settings.pop(name) for name in _OWN if name in settings} | own
    missing = [f"'--{name}'" for name in ("model", "data", "out") if name not in settings]
    if missing:
        raise typer.BadParameter(f"Missing option {', '.join(missing)}.")
    search, request = SearchRequest(**asked), TrainRequest(**settings)
    with looking_on(quiet) as watch:
        found = run_search(search, request, watch)
        if quiet:
            print_json({name: value for name, value in found.items() if name != "trials"})
        else:
            _show(found, watch)


def _show(found: dict[str, Any], watch: Any) -> None:
    cost, told = found["cost"], found["recommendation"]
    spent = f"{cost['runs']:.1f} full runs' worth of training in {cost['trials']} trials"
    watch.say(f"\n{spent}; a grid would take {cost['grid']:.0f}; report: {plain(found['report'])}")
    if told is not None:
        watch.say(f"[bold]{plain(told['kind'])}[/bold]: {plain(told['sentence'])}")
        watch.say(f"{plain(told['surer'])}\nThe same adapter again:\n  {plain(told['command'])}")


# What of training's options means something else here.
_TOLD = {
    "out": "Folder for the search; must be new or empty.",
    "resume": "Go on with the search in --out.",
    "hold_back": "Share kept back where there is no --valid: half of it chooses, half of it confirms [0.25].",
    "lr": "Middle of the ladder of learning rates.",
    "rank": "At which rates and layers are compared.",
    "alpha": "Of all ranks.",
}


def _as_told(parameter: inspect.Parameter) -> inspect.Parameter:
    """An option of training, in the search's own words where it has some."""
    if parameter.name not in _TOLD:
        return parameter
    kind, option = get_args(parameter.annotation)
    own = copy(option)
    own.help = _TOLD[parameter.name]
    return parameter.replace(annotation=Annotated[kind, own])


def _options() -> list[inspect.Parameter]:
    options: dict[str, Any] = {
        "budget": (str, "express (about 4 full runs), standard (13) or full (25) [standard]."),
        "ranks": (str, "Ranks of the ladder, with commas [by what there is to learn from]."),
        "also": (list[str], "Another candidate, as setting=value[,setting=value]; may be repeated."),
        "allocate": (str, "Give the rank out by layer, by activations or gradients, and see whether it is better."),
        "pack": (int, "Adapters that train side by side [what memory holds by the plan, at most 8]."),
        "until": (str, "Last step: count, noise, rate, targets, ladder, methods, allocation, confirm or ship [ship]."),
        "engine": (str, "Where packs are trained: local, or ray, several at once on one or many machines [local]."),
        "ray_address": (str, "Of a Ray cluster [one is begun on this machine]."),
        "workers": (int, "Of Ray [one a GPU; without, one for each 4 processors]."),
    }
    own = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                kind | None, typer.Option(f"--{name.replace('_', '-')}", help=told, show_default=False)
            ],
        )
        for name, (kind, told) in options.items()
    ]
    shared = [_as_told(parameter) for parameter in parameters() if parameter.name not in _LEFT_OUT]
    json = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    return [*shared, *own, json]


search.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
