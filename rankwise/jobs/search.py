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
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rankwise.adapters.presets import TARGET_ROLES
from rankwise.data.order import Order
from rankwise.data.split import split
from rankwise.engine.folder import LOCK, locked
from rankwise.engine.interrupt import Interrupted
from rankwise.errors import DataError, RunFolderError, SpecError
from rankwise.formats.tensors import write_text
from rankwise.jobs.documents import Documents, counts, read_documents
from rankwise.jobs.evaluate import frequencies
from rankwise.jobs.machine import available_bytes, machine_facts, versions
from rankwise.jobs.request import Repeated, TrainRequest
from rankwise.jobs.subject import Subject, subject_of
from rankwise.jobs.watch import Stages, Watch
from rankwise.reports.search import STEPS, Step
from rankwise.reports.search_page import write_search_report
from rankwise.search.advisor import Advisor
from rankwise.search.budget import BUDGETS
from rankwise.search.study import Study
from rankwise.search.trials import Parts, Trials
from rankwise.search.verdict import recommendation
from rankwise.settings import Settings
from rankwise.surgery.bank import Bank
from rankwise.texts import json_text

STUDY, RESULT = "study.sqlite", "search.json"
_HELD_BACK = 0.25  # without a validation file: half of it chooses, half of it confirms
_BYTES = 24  # a parameter of an adapter in training: itself, its gradient, two moments, and room for what passes
_MOST = 8  # adapters side by side, by itself: more gain nothing where a step has a thousand tokens


def _numbers(value: Any) -> Any:
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class SearchRequest(Settings):
    """What of a search is its own; the rest is a `TrainRequest`.

    Args:
        budget: how much is spent on each question (`search/budget.py`).
        ranks: of the ladder; by itself by what there is to learn from.
        also: other candidates, each `setting=value[,setting=value]` of `TrainRequest`, such as `form=dora`.
        pack: adapters that train side by side; 0 takes what memory holds, at most 8.
        until: the last step that is made.
    """

    budget: Literal["express", "standard", "full"] = "standard"
    ranks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_numbers)] = ()
    also: Repeated = ()
    pack: int = Field(default=0, ge=0)
    until: Step = "ship"


def run_search(asked: SearchRequest, request: TrainRequest, watch: Watch) -> dict[str, Any]:
    """Searches, and writes search.json, report.html and the adapter.

    Args:
        request: model, documents and where to begin: its rate is the middle of the ladder of rates, its rank that at
            which rates and layers are compared, its alpha that of all ranks.

    Returns:
        What search.json holds, with `out` and `report`.

    Raises:
        RankwiseError: of every kind; trials that were made are kept.
        Interrupted: SIGINT or SIGTERM; `way_on` is the command to go on with.
    """
    _check(asked, request)
    try:
        with _held(request.out, resume=request.resume):
            return _search(asked, request, watch)
    except Interrupted as heard:
        heard.way_on = f"; the trials so far are kept.  Go on with:\n  {_command(asked, request)} --resume"
        raise


def _check(asked: SearchRequest, request: TrainRequest) -> None:
    """That it is about an adapter that begins by itself, and can be cut where that is all that is paid for."""
    if request.whole or request.continue_from is not None or request.add_tokens:
        raise SpecError("a search is for fresh adapters", hint="leave out form full, continue_from and add_tokens")
    if request.rank_pattern or request.alpha_pattern:
        raise SpecError("a search finds ranks", hint="leave out rank_pattern and alpha_pattern; compress finds those")
    if request.form != "lora" and not BUDGETS[asked.budget].ladder:
        raise SpecError(
            f"budget {asked.budget} cuts one adapter of form lora, and the form is {request.form}",
            hint="--budget standard trains every rank",
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
    if request.valid is None and request.hold_back is None:
        request = TrainRequest(**request.model_dump(exclude_unset=True) | {"hold_back": _HELD_BACK})
    subject = subject_of(request, watch)
    documents = read_documents(request, subject.reader, watch)
    parts = _parts(documents, request.seed)
    order = Order(parts.train.lengths(), request.seed, request.batch_tokens, request.batch_documents)
    steps = request.max_steps or order.steps(request.epochs)
    request = TrainRequest(**request.model_dump(exclude_unset=True) | {"max_steps": steps, "evaluate_every": steps})
    with Bank(subject.base.model) as bank, Stages(watch) as stages:
        identity = {
            "base": bank.base_fingerprint,
            "documents": [part.digest for part in (parts.train, parts.choose, parts.confirm)],
            "shared settings": request.loop.model_dump(mode="json", exclude={"micro_tokens", "checkpointing"}),
        }
        with closing(Study(request.out / STUDY, identity)) as study:
            pack, shares = asked.pack or _fitting(bank, request), frequencies(subject.base, subject.classes)
            trials = Trials(bank, parts, request.loop, study, request.out, pack=pack, frequencies=shares, tell=stages)
            facts = _facts(request, subject, parts, order) | {"budget": asked.budget}
            yield _advisor(asked, request, subject, trials), request, facts


def _parts(documents: Documents, seed: int) -> Parts:
    """A file for tests confirms; without one half of the documents to judge by does."""
    choose, confirm = documents.valid, documents.test
    if confirm is choose:
        choose, confirm = split(choose, 0.5, seed)
    if min(len(choose), len(confirm)) < 2:
        raise DataError(
            f"{len(choose)} documents to choose by and {len(confirm)} to confirm on: an interval needs two",
            hint="give --valid and --test, or more rows",
        )
    return Parts(documents.train, choose, confirm)


def _fitting(bank: Bank, request: TrainRequest) -> int:
    """How many adapters train side by side in half of the memory that is free."""
    each = sum(site.shape.parameters(request.rank) for site in bank.sites.values() if site.role in _LINEAR)
    return min(_MOST, max(1, available_bytes(bank.model.device) // (2 * _BYTES * max(each, 1))))


_LINEAR = TARGET_ROLES["all-linear"]


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
    return Advisor(trials, spec, request.run, BUDGETS[asked.budget], parameters, asked.ranks, methods)


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
    answers = {
        "count": advisor.count,
        "noise": advisor.measure_noise,
        "rate": advisor.find_rate,
        "targets": advisor.compare_targets,
        "ladder": advisor.climb,
        "methods": advisor.try_methods,
        "confirm": advisor.confirm,
        "ship": lambda: advisor.ship(place, shipped),
    }
    for step in STEPS[: STEPS.index(asked.until) + 1]:
        answers[step]()
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
        "confirm": lambda: f"rank {found['chosen']}: {found['verdict']}",
        "ship": lambda: (
            f"{found['parameters']['compressed']:,} of {found['parameters']['whole']:,} parameters are left"
        ),
    }
    return f"[bold]{step:9}[/bold] {said[step]()}"


def _facts(request: TrainRequest, subject: Subject, parts: Parts, order: Order) -> dict[str, Any]:
    tokens = parts.train.lengths()
    seen = sum(int(tokens[order.step(step)[1]].sum()) for step in range(request.max_steps))
    named = {"train": parts.train, "choose": parts.choose, "confirm": parts.confirm}
    return {
        "schema": 1,
        "task": request.task,
        "machine": machine_facts(subject.base.device, subject.base.precision),
        "versions": versions(),
        "data": {name: counts(part) for name, part in named.items()},
        "full_run": {"steps": request.max_steps, "tokens": seen},
    }


def _told(advisor: Advisor, request: TrainRequest, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Writes what was found."""
    trials, record = advisor.trials, advisor.record
    known = trials.study.rows()
    found = None
    if record["confirm"] is not None:
        found = recommendation(record, advisor.found) | {"command": _winner(advisor, request)}
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


def _winner(advisor: Advisor, request: TrainRequest) -> str:
    """The command that trains the recommended adapter again: alone, and so to rounding."""
    found = advisor.found
    chosen = {"rank": found["rank"], "alpha": found["alpha"], "lr": found["lr"], "targets": advisor.spec.targets}
    given = request.model_dump(exclude_unset=True) | chosen | {"out": request.out / "winner", "resume": False}
    return TrainRequest(**given).command()


def _command(asked: SearchRequest, request: TrainRequest) -> str:
    named = [name for name in ("budget", "pack", "until") if name in asked.model_fields_set]
    own = [f"--{name} {getattr(asked, name)}" for name in named]
    own += [f"--ranks {','.join(map(str, asked.ranks))}"] if asked.ranks else []
    own += [f"--also {shlex.quote(one)}" for one in asked.also]
    return " ".join([request.command().replace("rankwise train", "rankwise search", 1), *own])
