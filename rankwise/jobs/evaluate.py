"""The base against adapters, and models that began as it, on a file of documents: what `rankwise evaluate` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from rankwise.data.classes import Classes
from rankwise.data.examples import Examples
from rankwise.data.intake import Overlong
from rankwise.data.prepare import Prepared
from rankwise.data.template import TrainOn
from rankwise.engine.evaluate import Evaluation, compared, evaluate, measured
from rankwise.errors import AdapterMismatchError, DataError, SpecError, listing
from rankwise.formats.peft import stated_task
from rankwise.formats.record import WHOLE, is_whole, read_record
from rankwise.frozen.load import Base
from rankwise.jobs.defaults import BY_TASK
from rankwise.jobs.reader import check_sources, load_for, reader_for
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Advance, Watch
from rankwise.jobs.whole import Before, Sitting, mark_of, measured_whole
from rankwise.kernels.sizes import Storage
from rankwise.surgery.bank import Bank
from rankwise.surgery.routing import Way
from rankwise.tasks import DEFAULT, TASKS


def run_evaluation(
    model: str,
    adapters: Sequence[Path],
    data: Sequence[str],
    watch: Watch,
    *,
    ranks: Sequence[int] = (),
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    **reading: Any,
) -> dict[str, Any]:
    """Losses of the base and of every adapter on the same documents, with paired 95 % intervals.

    Args:
        adapters: their folders, and those of models that were trained whole: these are loaded one after the other, and
            measured on the same documents as the base reads them.
        ranks: measures nested adapters at each of these in place of their own.
        reading: `task`, `max_length`, `overlong`, `train_on`, `seed`, `storage`, as `rankwise train` has them; None is
            what all adapters were trained with, and where they differ or do not say, what `rankwise train` does by
            itself.

    Returns:
        `{"task", "documents", "tokens", "base": {"loss"}, "adapters": [{"name", "loss", "delta": {"mean", "low",
        "high"}}], "truncated", "dropped", "unused"}`, in nats per judged item; an adapter is named by its folder.
        Where there are classes also `classes` and `reference` (what stands in the place of a base whose head is fresh),
        and beside every loss `accuracy` and `macro_f1`.  The last three say what of the rows was not measured, as
        `data.intake.Report` does.

    Raises:
        SpecError: the adapters are of several tasks, or one has not these ranks.
        DataError: losses that are not finite, and the documents; or bad rows.
        RankwiseError: of every other kind.
    """
    data = [expanduser(source) for source in data]
    adapters = [folder.expanduser() for folder in adapters]
    names = dict(zip(folder_names(adapters), adapters, strict=True))
    whole = {name: folder for name, folder in names.items() if is_whole(folder)}
    held = {name: folder for name, folder in names.items() if name not in whole}
    if ranks and whole:
        raise SpecError(f"{next(iter(whole.values()))}: a model that was trained whole has no ranks", hint=_ALONE)
    task = trained_task(adapters, reading.pop("task", None))
    asked = as_trained(adapters, reading, task)
    check_sources(task, data)
    loading = {"dtype": dtype, "device": device}
    known = trained_classes(adapters, task)
    side = _Side(model, task, known, asked, loading, held, tuple(dict.fromkeys(ranks)), force=force)
    found, sitting, table = side.measured(data, watch, alone=not whole)
    for name, folder in whole.items():  # the base is let go of by now: there is one model at a time
        (losses,), (predicted,) = measured_whole(folder, sitting, watch, force=force, **loading)
        table.rows[name] = losses, predicted
    report = found.report
    rest = {"truncated": report.truncated, "dropped": report.dropped, "unused": report.unused}
    told = [name for name in table.rows if name is not None] if ranks else list(names)
    return {"task": task} | table.compared(told, found.corpus).summary() | rest


_ALONE = "evaluate them one by one"


@dataclass
class _Table:
    """Losses and predictions, `[documents]`, of each model by its name, None the base; `shares` as in `frequencies`."""

    rows: dict[str | None, tuple[np.ndarray, np.ndarray]]
    shares: tuple[int, ...]

    def compared(self, names: Sequence[str], examples: Examples) -> Evaluation:
        """As `evaluate_finite`."""
        asked = [self.rows[name] for name in ([*names] if self.shares else [None, *names])]
        losses, predicted = (np.stack(columns) for columns in zip(*asked, strict=True))
        with np.errstate(all="ignore"):
            return finite(compared(names, examples, losses, predicted, self.shares), examples)


@dataclass(frozen=True)
class _Side:
    """A base and the adapters `held` on it, by name, or these at `ranks`; `asked` as `as_trained` gives it."""

    model: str
    task: str
    known: Classes | None
    asked: dict[str, Any]
    loading: dict[str, Any]
    held: dict[str, Path]
    ranks: tuple[int, ...]
    force: bool

    def measured(self, data: Sequence[str], watch: Watch, *, alone: bool) -> tuple[Prepared, Sitting, _Table]:
        """Reads the documents and measures on them; the model is gone afterwards.

        `alone`: no models of their own will be judged beside it, whose tokens are the base's.
        """
        reading = {name: value for name, value in self.asked.items() if name != "storage"}
        with watch.stage(f"loading {self.model}"):
            loading = self.loading | {"storage": self.asked["storage"]}
            loaded, classes = load_for(self.model, self.task, self.known, **loading)
        base = with_tokens_of(loaded, list(self.held.values()), force=self.force)
        if base is not loaded and not alone:
            raise SpecError(
                "an adapter has tokens of its own, which a model that was trained whole does not know", hint=_ALONE
            )
        reader = reader_for(base, classes, **reading)
        with watch.stage("reading the documents") as advance:
            found = reader.read(data, "test", lambda rows, share: advance(share))
        shares = frequencies(base, classes)
        with Bank(base.model) as bank:
            mark = mark_of(bank, base)
            for name, folder in self.held.items():
                load_adapter(bank, name, folder, base, reader.digest, force=self.force)
            ways: list[Way] = [*([] if shares else [None]), *self._ways(bank)]
            with watch.stage("evaluating") as advance:
                columns = measured(bank, ways, found.corpus, progress=lambda done, of: advance(done / of))
        names = [None if way is None else str(way) for way in ways]
        rows = dict(zip(names, zip(*columns, strict=True), strict=True))
        return found, Sitting(self.task, found.corpus, classes, reader.digest, mark), _Table(rows, shares)

    def _ways(self, bank: Bank) -> list[Way]:
        """Through the adapters: whole, or at each rank."""
        for name in self.held:
            for rank in self.ranks:
                bank.adapter(name).check_nested(rank)
        return [bank.prefix(name, rank) for name in self.held for rank in self.ranks] or [*self.held]


def frequencies(base: Base, classes: Classes | None) -> tuple[int, ...]:
    """How often each class was learnt from, alike where nobody counted; () where the base has a head of its own."""
    if classes is None or not base.fresh:
        return ()
    return classes.counts or (1,) * len(classes)


def evaluate_finite(
    bank: Bank, names: Sequence[str], examples: Examples, advance: Advance, shares: Sequence[int] = ()
) -> Evaluation:
    """The comparison, whose every number is one; `shares` as `frequencies` gives them.

    Raises:
        DataError: losses that are not finite; names the first documents.
    """
    with np.errstate(all="ignore"):  # what is not finite is told below, by document
        found = evaluate(bank, names, examples, frequencies=shares, progress=lambda done, of: advance(done / of))
    return finite(found, examples)


def after_training(
    bank: Bank, before: Before, examples: Examples, shares: tuple[int, ...], advance: Advance
) -> Evaluation:
    """As `evaluate_finite`, of a base that was itself trained."""
    found = measured(bank, [None], examples, progress=lambda done, of: advance(done / of))
    rows: dict[str | None, tuple[np.ndarray, np.ndarray]] = {WHOLE: (found[0][0], found[1][0])}
    if before.measured is not None:
        rows[None] = before.measured[0][0], before.measured[1][0]
    return _Table(rows, shares).compared([WHOLE], examples)


def finite(found: Evaluation, examples: Examples) -> Evaluation:
    """A comparison, if its every number is one.

    Raises:
        DataError: as `evaluate_finite`.
    """
    problems = []
    for name, losses in zip(("base", *found.names), (found.base, *found.losses), strict=True):
        bad = np.flatnonzero(~np.isfinite(losses))
        problems += [f"{examples.origin(int(i))}: {name}" for i in bad]
    if problems:
        raise DataError(
            f"the loss is not a finite number on these documents:\n{listing(problems)}",
            hint="--dtype float32 helps where numbers were too large for the format; else leave the adapter out",
        )
    return found


def trained_task(adapters: Sequence[Path], asked: str | None = None) -> str:
    """What the adapters were trained for, as their records say, or their PEFT configs.

    Raises:
        SpecError: for several things.
    """
    if asked is not None:
        return asked
    tasks = {folder: _task(folder) for folder in adapters}
    if len(set(tasks.values())) > 1:
        lines = [f"{folder}: {task}" for folder, task in tasks.items()]
        raise SpecError(f"adapters of several tasks:\n{listing(lines)}", hint="evaluate those of one task at a time")
    return next(iter(tasks.values()), DEFAULT)


def _task(folder: Path) -> str:
    record = read_record(folder)
    if record is not None:
        return str(record.get("task", DEFAULT))
    told = stated_task(folder)
    return next((name for name, task in TASKS.items() if told is not None and task.peft == told), DEFAULT)


def trained_classes(adapters: Sequence[Path], task: str) -> Classes | None:
    """The classes of the adapters' records; None where the task has none, or no record says.

    Raises:
        SpecError: they differ.
    """
    if not TASKS[task].classifies:
        return None
    told = [record["classes"] for folder in adapters if (record := read_record(folder)) and record.get("classes")]
    found = [Classes.of_json(rows) for rows in told]
    if any(one.names != found[0].names for one in found):
        listed = [", ".join(one.names) for one in found]
        raise SpecError(f"adapters of different classes:\n{listing(listed)}", hint="evaluate them one at a time")
    return found[0] if found else None


_TRAINED: dict[str, TypeAdapter[Any]] = {
    "max_length": TypeAdapter(Annotated[int, Field(ge=2)]),
    "overlong": TypeAdapter(Overlong),
    "train_on": TypeAdapter(TrainOn),
    "seed": TypeAdapter(Annotated[int, Field(ge=0)]),
    "storage": TypeAdapter(Storage),
}
_BY_ITSELF: dict[str, Any] = {
    "max_length": 2048,
    "overlong": "truncate",
    "train_on": "all",
    "seed": 0,
    "storage": "dense",
}


def as_trained(adapters: Sequence[Path], asked: dict[str, Any], task: str = DEFAULT) -> dict[str, Any]:
    """Each setting as asked for, else as in the training of all adapters, else as training has it by itself."""
    if unknown := asked.keys() - _TRAINED.keys():
        raise SpecError(f"no setting of reading: {', '.join(sorted(unknown))}", hint=", ".join(_TRAINED))
    records = [read_record(folder) or {} for folder in adapters]
    tables = [{row.get("name"): row.get("value") for row in record.get("settings", [])} for record in records]
    by_itself = _BY_ITSELF | {name: value for name, (value, _) in BY_TASK[task].items() if name in _TRAINED}
    chosen = {}
    for name, kind in _TRAINED.items():
        # How a base is held says a model nothing that was trained itself.
        values = [t.get(name) for t in tables if name != "storage" or t.get("form") != WHOLE]
        agreed = values[0] if values and all(value == values[0] for value in values) else None
        try:
            chosen[name] = kind.validate_python(agreed if asked.get(name) is None else asked[name], strict=True)
        except ValidationError:
            if asked.get(name) is not None:
                raise SpecError(f"{name} = {asked[name]!r} is none that `rankwise train` takes") from None
            chosen[name] = by_itself[name]
    return chosen


def check_task(folder: Path, task: str) -> None:
    """That an adapter's record, if it has one, says this task.

    Raises:
        AdapterMismatchError: it says another.
    """
    trained_for = (read_record(folder) or {}).get("task", task)
    if trained_for != task:
        raise AdapterMismatchError(
            f"{folder}: trained for {trained_for}, and the base is here for {task}",
            hint="rankwise evaluate and merge find the task out by themselves; chat is for causal-lm",
        )


def load_adapter(
    bank: Bank, name: str, folder: Path, base: Base, digest: str, *, rank: int | None = None, force: bool
) -> None:
    """Loads an adapter, a nested one at a `rank`, and checks that the model is talked to as in training.

    `digest` is the reader's.

    Raises:
        AdapterMismatchError: another task, or, unless `force`, another base, chat template or tokenizer.
        SpecError: the adapter has not that rank.
    """
    check_task(folder, base.task)
    bank.load(name, folder, rank=rank, force=force)
    trained_with = (read_record(folder) or {}).get("template", {}).get("digest")
    if trained_with not in (None, digest) and not force:
        raise AdapterMismatchError(
            f"{folder}: trained with another chat template or tokenizer than {base.name} has",
            hint="use the tokenizer it was trained with; to go on all the same, --force",
        )


def folder_names(folders: Sequence[Path]) -> list[str]:
    """A name for each adapter: its folder's, or as much of the path as tells them apart.

    Raises:
        SpecError: the same folder twice.
    """
    paths = [folder.expanduser().resolve() for folder in folders]
    twice = next((str(folder) for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise SpecError(f"{twice}: the same adapter folder is named twice", hint="name it once")
    depths = range(1, max((len(path.parts) for path in paths), default=1) + 1)
    for names in ([_name(path, depth) for path in paths] for depth in depths):
        if len(set(names)) == len(names):
            return names
    return [f"{number}-{_name(path, 1)}"[:64] for number, path in enumerate(paths, start=1)]


def _name(path: Path, depth: int) -> str:
    """The last parts of a path as an adapter's name may be."""
    text = "-".join(part.strip("/\\") for part in path.parts[-depth:])
    allowed = "".join(c if (c.isalnum() and c.isascii()) or c in "._-" else "-" for c in text)
    return allowed[-64:].strip(".-_") or "adapter"
