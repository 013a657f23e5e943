"""A model whose weights are all trained: what must be known before the first step, what is saved, how it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.data.classes import Classes
from rankwise.data.examples import Examples
from rankwise.engine.evaluate import measured
from rankwise.errors import AdapterMismatchError, SpecError
from rankwise.formats.record import check_base, describe_whole, is_whole, read_record, write_record
from rankwise.frozen.load import Base, load_base
from rankwise.frozen.save import save_base
from rankwise.jobs.samples import Asked
from rankwise.jobs.watch import Watch
from rankwise.surgery.bank import Bank

Measured = tuple[np.ndarray, np.ndarray]  # losses and predictions, `[models, documents]`


def check_adapters(folders: Sequence[Path], hint: str) -> None:
    """That none of them holds a model that was trained whole.

    Raises:
        SpecError: one does; `hint` says what it is for, of the folder `{}`.
    """
    for folder in folders:
        if is_whole(folder):
            raise SpecError(f"{folder}: holds a model, all of whose weights were trained, and no adapter", hint=hint)


@dataclass(frozen=True)
class Before:
    """What is known of a base, which training makes another of.

    Attributes:
        facts: of the base, as a record has them.
        measured: of the documents that the comparison is made on; None where they are too few, or there is no need.
        answers: to the samples.
    """

    facts: dict[str, Any]
    measured: Measured | None
    answers: list[str]


def before_training(bank: Bank, base: Base, examples: Examples, asked: Asked, watch: Watch, *, judged: bool) -> Before:
    """Measures and asks the base; not its losses where it is not `judged`, its head being fresh."""
    facts = {
        "name": base.name,
        "fingerprint": mark_of(bank, base),
        "storage": base.storage,
        "vocabulary": bank.vocabulary.size,
    }
    found = None
    if judged and len(examples) > 1:
        with watch.stage("measuring the base") as advance:
            found = measured(bank, [None], examples, progress=lambda done, of: advance(done / of))
    with watch.stage("answering samples before training") as advance:
        return Before(facts, found, asked.answers(bank, None, advance))


def mark_of(bank: Bank, base: Base) -> str:
    """The fingerprint of a base without what is fresh in it, which chance makes another every time."""
    return bank.identity.beside(base.fresh, bank.vocabulary.size)


def save_whole(bank: Bank, base: Base, before: Before, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the model as it has become, and last its record.

    Raises:
        ModelError, RunFolderError: of writing.
    """
    save_base(base.model, base.tokenizer, folder)
    count = sum(weight.numel() for weight in base.model.parameters())
    write_record(folder, describe_whole(count, bank.base_fingerprint, before.facts, facts))


@dataclass(frozen=True)
class Sitting:
    """Documents as they were read for a base, for other models to be judged on.

    Attributes:
        task: what for.
        examples: the documents.
        classes: what is told apart; None for a task without.
        digest: of how the base is talked to.
        mark: of the base itself, as `mark_of` gives it.
    """

    task: str
    examples: Examples
    classes: Classes | None
    digest: str
    mark: str


def measured_whole(folder: Path, sitting: Sitting, watch: Watch, *, force: bool, **loading: Any) -> Measured:
    """Losses and predictions of a model that was trained whole, `[1, documents]`; it is let go of afterwards.

    Args:
        force: measure a model all the same that began as another base, or is talked to otherwise.
        loading: `dtype` and `device`, as of `load_base`.

    Raises:
        AdapterMismatchError: as `force` allows, or it is for another task, or tells other classes apart.
        ModelError: it cannot be loaded.
    """
    record = read_record(folder) or {}
    if record.get("task", sitting.task) != sitting.task:
        raise AdapterMismatchError(
            f"{folder}: trained for {record['task']}, the others for {sitting.task}", hint="evaluate it by itself"
        )
    if not force:
        check_base(record, sitting.mark, folder)
        if record.get("template", {}).get("digest") not in (None, sitting.digest):
            raise AdapterMismatchError(
                f"{folder}: trained with another chat template or tokenizer than the base has",
                hint="evaluate it by itself, as --model; to go on all the same, --force",
            )
    names = sitting.classes.names if sitting.classes is not None else ()
    with watch.stage(f"loading {folder}"):
        base = load_base(folder, task=sitting.task, **loading)
    if base.classes != tuple(names):
        raise AdapterMismatchError(
            f"{folder}: tells apart {', '.join(base.classes)}, the documents have {', '.join(names)}",
            hint="evaluate models of the same classes together",
        )
    with Bank(base.model) as bank, watch.stage(f"evaluating {folder}") as advance:
        return measured(bank, [None], sitting.examples, progress=lambda done, of: advance(done / of))
