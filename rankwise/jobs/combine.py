"""Adapters of one base made into one: what `rankwise combine` does."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.combining import Combination, combine, obstacles, refuse
from rankwise.adapters.recipe import Recipe
from rankwise.data.classes import Classes
from rankwise.errors import AdapterMismatchError, RankwiseError, listing
from rankwise.formats.peft import read_adapter
from rankwise.formats.record import read_record
from rankwise.frozen.load import Base
from rankwise.jobs.evaluate import (
    as_trained,
    folder_names,
    load_adapter,
    run_evaluation,
    trained_classes,
    trained_task,
)
from rankwise.jobs.machine import versions
from rankwise.jobs.place import whole_folder
from rankwise.jobs.reader import check_sources, load_for, reader_for
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Watch
from rankwise.jobs.whole import check_adapters
from rankwise.surgery.bank import Bank

_NAME = "combined"
_OF_READING = ("max_length", "overlong", "train_on", "storage")  # settings of training that evaluating asks for
_SAID = ("max_length", "overlong", "train_on", "dtype", "storage", "device")  # options of `rankwise evaluate`
_UNSEEN = "UNSEEN"  # in the place of a file that nobody knows


def run_combination(
    model: str,
    adapters: Sequence[Path],
    out: Path,
    watch: Watch,
    recipe: Recipe | None = None,
    *,
    data: Sequence[str] = (),
    force: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Writes one adapter that does what several do, and says how to measure that, or measures it.

    Args:
        adapters: their folders, all of one base, which is checked; of one task.
        recipe: how; without one their ΔW are added, exactly.
        data: documents to measure on, file by file: the base, every adapter and what became of them.
        how: `dtype`, `device` and what `run_evaluation` takes of reading: of the measurement.

    Returns:
        What `Combination.record` gives, with `out`, `adapters` (name → folder), `parameters`; `evaluate`, the commands
        that measure it, each with the names of the adapters whose `data` it takes (or None, where no record says); and
        `evaluations`, as of `run_evaluation`, one for each file of `data`.

    Raises:
        SpecError: adapters that cannot be combined, all that is in the way.
        AdapterMismatchError: of another base, chat template or tokenizer, unless `force`; all of them.
        RunFolderError: `out` exists and is not an empty folder, or cannot be written.
        RankwiseError: of every other kind.
    """
    recipe = recipe or Recipe()
    adapters, data = [folder.expanduser() for folder in adapters], [expanduser(source) for source in data]
    names = dict(zip(folder_names(adapters), adapters, strict=True))
    weights = recipe.weights_of(list(names))
    check_adapters(adapters, "it is a model of its own; leave it out")
    _check_alone(names, recipe, weights)
    task = trained_task(adapters)
    check_sources(task, data)
    subject = _Subject(model, task, names, force)
    made = _written(subject, recipe, out, watch)
    if data:
        watch.say(f"{out}: written; now it is measured")  # whatever may be wrong with the documents
    tables = []
    for source in data:
        found = run_evaluation(model, [*adapters, out], [source], watch, force=force, **how)
        tables.append({"data": source} | found)
    return made.record() | {
        "out": str(out),
        "adapters": {name: str(folder) for name, folder in names.items()},
        "parameters": made.adapter.parameter_count(),
        "evaluate": _measures(subject, data, out, how),
        "evaluations": tables,
    }


@dataclass(frozen=True)
class _Subject:
    """What is combined, on what."""

    model: str
    task: str
    names: Mapping[str, Path]
    force: bool

    @property
    def folders(self) -> list[Path]:
        return list(self.names.values())

    def command(self, recipe: Recipe, out: Path) -> str:
        told = ["--model", self.model, "--out", str(out), "--method", recipe.method]
        for name in ("weights", "rank", "density", "seed"):
            value = getattr(recipe, name)
            if value is not None:
                told += [f"--{name}", ",".join(f"{w:g}" for w in value) if name == "weights" else f"{value:g}"]
        return shlex.join(["rankwise", "combine", *map(str, self.folders), *told])


def _check_alone(names: Mapping[str, Path], recipe: Recipe, weights: Mapping[str, float]) -> None:
    """All that can be known without the base, before it is loaded.

    Raises:
        RankwiseError: a folder's own if that is all, else a `SpecError` of everything.
    """
    read, failures = _gathered(names, lambda name, folder: read_adapter(folder))
    problems = [(error.message, error.hint) for error in failures] + obstacles(read, recipe, weights)
    if failures and len(problems) == 1:
        raise failures[0]
    refuse(problems)


def _gathered(
    names: Mapping[str, Path], one: Callable[[str, Path], Adapter]
) -> tuple[dict[str, Adapter], list[RankwiseError]]:
    """Of every folder its adapter, or what is wrong with it."""
    found, failures = {}, []
    for name, folder in names.items():
        try:
            found[name] = one(name, folder)
        except RankwiseError as error:
            failures.append(error)
    return found, failures


def _written(subject: _Subject, recipe: Recipe, out: Path, watch: Watch) -> Combination:
    """Reads, combines and saves; the base is gone afterwards."""
    with whole_folder(out.expanduser().resolve()) as place:
        with watch.stage(f"loading {subject.model}"):
            known = trained_classes(subject.folders, subject.task)
            loaded, classes = load_for(subject.model, subject.task, known, device="cpu")
        base = with_tokens_of(loaded, subject.folders, force=subject.force)
        reading = as_trained(subject.folders, {}, subject.task)
        del reading["storage"]  # the base is looked at, and computes nothing
        digest = reader_for(base, classes, **reading).digest
        with Bank(base.model) as bank:
            adapters = _on(bank, base, subject, digest)
            with watch.stage(f"combining by {recipe.method}") as advance:
                made = combine(adapters, recipe, advance)
            bank.put(_NAME, made.adapter)
            bank.save(_NAME, place, _facts(subject, base, classes, digest, made, subject.command(recipe, out)))
        if base is not loaded:
            base.tokenizer.save_pretrained(place)
    return made


def _on(bank: Bank, base: Base, subject: _Subject, digest: str) -> dict[str, Adapter]:
    """Every adapter as it is on this base, by paths that the base knows; the bank is empty again.

    Raises:
        AdapterMismatchError: some are of another; all of them.
    """

    def one(name: str, folder: Path) -> Adapter:
        load_adapter(bank, name, folder, base, digest, force=subject.force)
        found = bank.adapter(name)
        bank.remove(name)
        return found

    found, failures = _gathered(subject.names, one)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise AdapterMismatchError(
            f"{len(failures)} of {len(subject.names)} adapters do not go with {base.name}:\n"
            f"{listing(error.message for error in failures)}",
            hint="; ".join(dict.fromkeys(error.hint for error in failures if error.hint)),
        )
    return found


def _facts(
    subject: _Subject, base: Base, classes: Classes | None, digest: str, made: Combination, command: str
) -> dict[str, Any]:
    """What the record says beside the adapter: where it comes from, and how its model is talked to."""
    records = [read_record(folder) or {} for folder in subject.folders]
    tables = [{row.get("name"): row for row in record.get("settings", [])} for record in records]
    shared = [
        tables[0][name]
        for name in _OF_READING
        if all(name in table and table[name].get("value") == tables[0][name].get("value") for table in tables)
    ]
    tokens = {text: token for record in records for text, token in record.get("new_tokens", {}).items()}
    sources = [
        {"name": name, "weight": made.weights[name], "digest": own.digest()}
        for name, own in ((name, read_adapter(folder)) for name, folder in subject.names.items())
    ]
    told = made.record()
    return {
        "task": subject.task,
        **({"classes": classes.to_json()} if classes is not None else {}),
        **({"new_tokens": tokens} if tokens else {}),
        "versions": versions(),
        "settings": shared,
        "template": {"digest": digest},
        "combination": {name: told[name] for name in _RECORDED} | {"of": sources},
        "command": command,
    }


_RECORDED = ("method", "density", "seed", "error", "errors", "taken")


def _measures(subject: _Subject, data: Sequence[str], out: Path, how: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The commands that say how each task fares: the base, every adapter and what became of them.

    On the files of `data`; without any, on those that the adapters were tested or judged by in their training.
    """
    of: dict[str | None, list[str]] = {source: [] for source in data}
    for name, folder in {} if data else subject.names.items():
        rows = {row.get("name"): row.get("value") for row in (read_record(folder) or {}).get("settings", [])}
        source = next((str(rows[part]) for part in ("test", "valid") if rows.get(part)), None)
        of.setdefault(source, []).append(name)
    adapters = [word for folder in [*subject.folders, out] for word in ("--adapter", str(folder))]
    asked = {name: value for name, value in how.items() if name in _SAID and value not in (None, "auto")}
    told = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    told += ["--force"] if subject.force else []
    return [
        {
            "of": names,
            "data": source,
            "command": shlex.join(
                ["rankwise", "evaluate", "--model", subject.model, "--data", source or _UNSEEN, *adapters, *told]
            ),
        }
        for source, names in of.items()
    ]
