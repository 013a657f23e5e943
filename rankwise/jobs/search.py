"""Which learning rate, which layers, which rank: what `rankwise search` does.

out/
├── search.json  report.html     every answer with its numbers; the same for people
├── adapter/                     the chosen one, with what it does without taken out
├── study.sqlite  adapters/      every trial, and those of full length as adapters: what --resume goes on from
└── packs/                       checkpoints of what is being trained
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rankwise.adapters.presets import TARGET_ROLES
from rankwise.adapters.spec import DATA_STARTS
from rankwise.engine.folder import LOCK, locked
from rankwise.engine.interrupt import Interrupt, going_on
from rankwise.engine.look import Spectrum
from rankwise.errors import RunFolderError, SpecError
from rankwise.formats.tensors import write_text
from rankwise.jobs.ground import ground_of
from rankwise.jobs.request import Repeated, TrainRequest
from rankwise.jobs.spread import Spread
from rankwise.jobs.subject import Subject
from rankwise.jobs.watch import Stages, Watch
from rankwise.reports.search import STEPS, Step
from rankwise.reports.search_page import write_search_report
from rankwise.search.advisor import Advisor
from rankwise.search.budget import BUDGETS
from rankwise.search.study import Study
from rankwise.search.trials import Trials
from rankwise.search.verdict import recommendation
from rankwise.settings import Settings
from rankwise.surgery.bank import Bank
from rankwise.texts import json_text

STUDY, RESULT = "study.sqlite", "search.json"


def _numbers(value: Any) -> Any:
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class SearchRequest(Settings):
    """What of a search is its own; the rest is a `TrainRequest`.

    Args:
        budget: how much is spent on each question (`search/budget.py`).
        ranks: of the ladder; by itself by what there is to learn from.
        allocate: what the chosen rank's parameters are given out to layers by; by itself they are not.
        also: other candidates, each `setting=value[,setting=value]` of `TrainRequest`, such as `form=dora`.
        pack: adapters that train side by side; 0 takes what memory holds, at most 8.
        until: the last step that is made.
        engine: where packs are trained: `local`, here one after the other, or `ray`, several at once.
        ray_address: of a cluster; None begins one on this machine.
        workers: of Ray; 0 takes one for each GPU, or for each four processors.
    """

    budget: Literal["express", "standard", "full"] = "standard"
    ranks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_numbers)] = ()
    also: Repeated = ()
    allocate: Spectrum | None = None
    pack: int = Field(default=0, ge=0)
    until: Step = "ship"
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits_the_engine(self) -> SearchRequest:
        astray = sorted({"ray_address", "workers"} & self.model_fields_set)
        if self.engine != "ray" and astray:
            raise ValueError(f"{', '.join(astray)}: of engine ray alone, and the engine is {self.engine}")
        return self


def run_search(asked: SearchRequest, request: TrainRequest, watch: Watch) -> dict[str, Any]:
    """Searches, and writes search.json, report.html and the adapter.

    SIGINT and SIGTERM end it with an `Interrupted` (`engine/interrupt.py`) whose `way_on` is the command to go on with.

    Args:
        request: model, documents and where to begin: its rate is the middle of the ladder of rates, its rank that at
            which rates and layers are compared, its alpha that of all ranks.

    Returns:
        What search.json holds, with `out` and `report`.

    Raises:
        RankwiseError: of every kind; trials that were made are kept.
    """
    _check(asked, request)
    # What is not a pack, which saves itself, has nothing to save: it is stopped where it is.
    with (
        going_on(lambda _: _way_on(asked, request)),
        Interrupt(at_once=True),
        _held(request.out, resume=request.resume),
    ):
        return _search(asked, request, watch)


def _way_on(asked: SearchRequest, request: TrainRequest) -> str:
    if (request.out / STUDY).exists():
        return f"; the trials so far are kept.  Go on with:\n  {_command(asked, request)} --resume"
    return f" before the first trial.  Begin again with:\n  {_command(asked, request)}"


def _check(asked: SearchRequest, request: TrainRequest) -> None:
    """That it is about an adapter that begins by itself, and can be cut where that is all that is paid for."""
    further = request.continue_from or request.onto or request.replay
    if request.whole or further is not None or request.add_tokens:
        apart = "form full, continue_from, onto, replay and add_tokens"
        raise SpecError("a search is for fresh adapters", hint=f"leave out {apart}")
    if request.rank_pattern or request.alpha_pattern:
        raise SpecError("a search finds ranks", hint="leave out rank_pattern and alpha_pattern; compress finds those")
    if request.nested:
        raise SpecError("a search compares ranks that are trained alone", hint="leave out nested; train with it after")
    if asked.allocate is not None:
        _check_allocation(request)
    if request.form != "lora" and BUDGETS[asked.budget].cut:
        raise SpecError(
            f"budget {asked.budget} cuts one adapter of form lora, and the form is {request.form}",
            hint="--budget standard trains every rank",
        )


def _check_allocation(request: TrainRequest) -> None:
    """That ranks are not given out twice, and by documents that can be looked at."""
    if request.form == "adalora" or request.init in DATA_STARTS:
        named = "form adalora" if request.form == "adalora" else f"init {request.init}"
        raise SpecError(
            f"--allocate gives the ranks out, and {named} looks for itself where directions belong",
            hint="leave out one of the two",
        )
    if request.task != "causal-lm":
        raise SpecError(
            f"--allocate looks at documents as task causal-lm reads them, and the task is {request.task}",
            hint="leave out --allocate; compress finds a rank for each layer for every task",
        )


@contextmanager
def _held(out: Path, *, resume: bool) -> Iterator[None]:
    with locked(out):
        begun = (out / STUDY).exists()
        if begun and not resume:
            raise RunFolderError(
                f"{out}: holds a search already; nothing was overwritten",
                hint="--resume goes on with it, or choose another --out",
            )
        if resume and not begun:
            raise RunFolderError(f"{out}: no search to resume", hint="leave out --resume to begin one")
        if not begun and any(child.name != LOCK for child in out.iterdir()):
            raise RunFolderError(f"{out}: not empty; nothing was overwritten", hint="choose another --out")
        yield


def _search(asked: SearchRequest, request: TrainRequest, watch: Watch) -> dict[str, Any]:
    began = time.monotonic()
    with opened(asked, request, watch) as (advisor, whole, facts):
        _ask(advisor, asked, whole, facts, watch)
        return _told(advisor, whole, facts | {"command": _command(asked, request)}, time.monotonic() - began)


@contextmanager
def opened(
    asked: SearchRequest, request: TrainRequest, watch: Watch
) -> Iterator[tuple[Advisor, TrainRequest, dict[str, Any]]]:
    """An advisor with the model and the documents, before its first question.

    Yields:
        It; the request with the length of a full run in steps, and with what is held back; and facts for search.json.
    """
    ground = ground_of(request, watch)
    base = ground.subject.base
    with ExitStack() as held:
        bank, stages = held.enter_context(Bank(base.model)), held.enter_context(Stages(watch))
        identity = ground.identity(bank)
        study = held.enter_context(closing(Study(request.out / STUDY, identity)))
        pack, why = (asked.pack, "asked for") if asked.pack else ground.fitting(bank, asked.ranks)
        watch.say(f"{pack} adapters side by side: {why}")
        packs = None
        if asked.engine == "ray":
            packs = held.enter_context(
                Spread(ground.request, identity, address=asked.ray_address, workers=asked.workers)
            )
        how: dict[str, Any] = {"pack": pack, "packs": packs, "tell": stages}
        trials = Trials(bank, ground.parts, ground.request.loop, study, request.out, **how)
        facts = ground.facts() | {"budget": asked.budget, "pack": {"adapters": pack, "reason": why}}
        yield _advisor(asked, ground.request, ground.subject, trials), ground.request, facts


def _advisor(asked: SearchRequest, request: TrainRequest, subject: Subject, trials: Trials) -> Advisor:
    """Alpha is one number for all ranks: with the rate, it is what curves depend on."""
    spec = request.spec_with(subject.base.fresh)
    sites = trials.bank.sites.values()
    parameters = {
        name: sum(site.shape.parameters(1) for site in sites if site.role in roles)
        for name, roles in TARGET_ROLES.items()
    }
    if not (isinstance(spec.targets, str) and spec.targets in parameters):
        trials.bank.add("probe", spec.model_copy(update={"rank": 1, "init": "kaiming", "form": "lora"}))
        parameters["named layers"] = trials.bank.adapter("probe").parameter_count()
        trials.bank.remove("probe")
    methods = {text: _method(request, text, subject) for text in asked.also}
    return Advisor(trials, spec, request.run, BUDGETS[asked.budget], parameters, asked.ranks, methods, asked.allocate)


def _method(request: TrainRequest, text: str, subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of the spec and of the run another candidate has otherwise."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise SpecError(f"--also {text!r}: expected setting=value, such as form=dora or lr_ratio=16")
    changed = {name.strip().replace("-", "_"): value.strip() for name, _, value in pairs}
    other = TrainRequest(**request.model_dump(exclude_unset=True) | changed)
    specs = [one.spec_with(subject.base.fresh).model_dump() for one in (other, request)]
    runs = [one.run.model_dump() for one in (other, request)]
    found = [{name: value for name, value in a.items() if value != b[name]} for a, b in (specs, runs)]
    if not any(found):
        raise SpecError(f"--also {text!r}: no other candidate than the one that is searched for")
    return found[0], found[1]


def _ask(advisor: Advisor, asked: SearchRequest, request: TrainRequest, facts: dict[str, Any], watch: Watch) -> None:
    """Every step up to the last one that is wanted; each answer is told as it comes."""
    place = request.out / "adapter"
    shipped = {name: facts[name] for name in ("task", "versions", "machine")}
    for step in STEPS[: STEPS.index(asked.until) + 1]:
        if step == "ship":
            advisor.ship(place, shipped)
        else:
            advisor.ask(step)
        if (line := _line(step, advisor)) is not None:
            watch.say(line)


def _line(step: str, advisor: Advisor) -> str | None:
    """An answer in a line, as it comes."""
    found = advisor.record[step]
    if found is None:
        return None
    said = {
        "count": lambda: (
            f"base loss {found['base']['choose']:.4f}; ranks {', '.join(map(str, found['ranks']))}, "
            f"{found['parameters_per_rank']:,} parameters each"
        ),
        "noise": lambda: (
            f"from seed to seed a training moves by {found['deviation']:.4f} nats; two of them are told "
            f"apart from {found['detectable']:.4f} nats on; {found['tolerance']:.4f} may be lost"
        ),
        "rate": lambda: f"{found['best']:.3g}" + ("" if found["interior"] else ", at the end of what was tried"),
        "targets": lambda: found["chosen"],
        "ladder": lambda: f"rank {found['chosen']}, the best is {found['best']}",
        "methods": lambda: ", ".join(f"{point['name']} {point['verdict']}" for point in found["points"]),
        "allocation": lambda: found["sentence"],
        "confirm": lambda: f"rank {found['chosen']}: {found['verdict']}",
        "ship": lambda: (
            f"{found['parameters']['compressed']:,} of {found['parameters']['whole']:,} parameters are left"
            + (f"; {found['control']['kept']} at these ranks is kept" if found["control"] is not None else "")
        ),
    }
    return f"[bold]{step:10}[/bold] {said[step]()}"


def _told(advisor: Advisor, request: TrainRequest, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Writes what was found."""
    trials, record = advisor.trials, advisor.record
    known = trials.study.rows()
    found = None
    if record["confirm"] is not None:
        found = recommendation(record, advisor.found) | {"command": winner(advisor, request)}
    rows = [
        {
            "name": name,
            "step": step,
            "seed": seed,
            "share": steps / request.max_steps,
            "status": one.status,
            "loss": None if one.choose is None else float(one.choose.sum() / trials.items("choose").sum()),
            "curve": [list(point) for point in one.curve],
        }
        for step, name, seed, steps, one in known
    ]
    spent = sum(one.seconds for *_, one in known)
    rates = len(record["rate"]["rungs"][0]["points"]) if record["rate"] is not None else 1
    told = facts | {
        "model": {"name": request.model, "fingerprint": trials.bank.base_fingerprint},
        "seconds": seconds,
        **record,
        "cost": {"runs": trials.cost, "trials": len(rows), "grid": float(rates * len(advisor.ranks)), "seconds": spent},
        "trials": rows,
        "recommendation": found,
    }
    write_text(request.out / RESULT, json_text(told, indent=1) + "\n")
    report = write_search_report(request.out)
    return told | {"out": str(request.out), "report": str(report)}


def winner(advisor: Advisor, request: TrainRequest) -> str:
    """The command that trains the recommended adapter again: alone, and so to rounding."""
    found = advisor.found
    chosen = {"rank": found["rank"], "alpha": found["alpha"], "lr": found["lr"], "targets": advisor.spec.targets}
    chosen |= {"rank_pattern": found["rank_pattern"]} if found["rank_pattern"] else {}
    given = request.model_dump(exclude_unset=True) | chosen | {"out": request.out / "winner", "resume": False}
    return TrainRequest(**given).command()


def _command(asked: SearchRequest, request: TrainRequest) -> str:
    named = [
        name
        for name in ("budget", "pack", "until", "allocate", "engine", "ray_address", "workers")
        if name in asked.model_fields_set
    ]
    own = [f"--{name.replace('_', '-')} {getattr(asked, name)}" for name in named]
    own += [f"--ranks {','.join(map(str, asked.ranks))}"] if asked.ranks else []
    own += [f"--also {shlex.quote(one)}" for one in asked.also]
    return " ".join([request.command().replace("rankwise train", "rankwise search", 1), *own])
