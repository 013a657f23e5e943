"""An adapter made smaller as far as that is not measurably worse: what `rankwise compress` does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any, get_args

from rankwise.data.classes import Classes
from rankwise.data.examples import Examples
from rankwise.errors import SpecError, nearest
from rankwise.formats.peft import stated_form
from rankwise.formats.record import read_record
from rankwise.formats.tensors import write_text
from rankwise.frozen.load import Base
from rankwise.jobs.evaluate import as_trained, frequencies, load_adapter, trained_classes, trained_task
from rankwise.jobs.machine import machine_facts, versions
from rankwise.jobs.place import whole_folder
from rankwise.jobs.reader import check_sources, load_for, reader_for
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Stages, Watch
from rankwise.jobs.whole import check_adapters
from rankwise.reports.card import write_card
from rankwise.reports.page import write_report
from rankwise.search.compression import Compression, check_divisible, compress
from rankwise.search.tolerance import Tolerance
from rankwise.search.worth import Worth
from rankwise.surgery.bank import Bank
from rankwise.texts import json_text

_NAME = "adapter"
_OF_TRAINING = ("task", "classes", "settings", "data", "template", "new_tokens")  # what stays true of a smaller one


def run_compression(
    model: str,
    adapter: Path,
    data: Sequence[str],
    out: Path,
    watch: Watch,
    *,
    worth: str = "fisher",
    tolerance: str = "2%",
    force: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Writes the smallest part of an adapter that is shown not to be worse than the tolerance allows.

    Args:
        data: documents that the adapter was not trained on.
        worth: by what it is taken apart and the parts are put in order: `fisher`, `activations` or `plain`.
        tolerance: a share of what the adapter gains over its base (`2%`), or nats per judged item (`0.003`).
        how: the base is loaded and documents are read, as of `run_evaluation`.

    Returns:
        What `Compression.record` gives, with `out`, `adapter` and `report`.

    Raises:
        DataError: nothing is shown to be dispensable; nothing is written then.
        RankwiseError: of every other kind.
    """
    allowed, by = Tolerance.said(tolerance), _worth(worth)
    adapter, data = adapter.expanduser(), [expanduser(source) for source in data]
    check_adapters([adapter], "its weights are no sum of parts; train an adapter to have a small one")
    check_divisible(adapter.name, stated_form(adapter))
    with whole_folder(out.expanduser().resolve()) as place:
        subject = _subject(model, adapter, data, watch, force=force, **how)
        with Bank(subject.base.model) as bank:
            load_adapter(bank, _NAME, adapter, subject.base, subject.digest, force=force)
            with Stages(watch) as stages:
                settings: dict[str, Any] = {"worth": by, "tolerance": allowed, "seed": subject.seed}
                shares = frequencies(subject.base, subject.classes)
                found = compress(bank, _NAME, subject.documents, **settings, frequencies=shares, advance=stages)
            record = read_record(adapter) or {}
            facts = {name: record[name] for name in _OF_TRAINING if name in record} | {
                "task": subject.task,
                "versions": versions(),
                "machine": machine_facts(subject.base.device, subject.base.precision),
                "compression": found.record() | {"source": bank.adapter(_NAME).digest()},
                "command": _command(model, adapter, data, out, worth, tolerance),
            }
            bank.put("compressed", found.adapter)
            bank.save("compressed", place, facts)
        if subject.enlarged:
            subject.base.tokenizer.save_pretrained(place)
        _tell(found, place, watch)
    return found.record() | {"adapter": str(adapter), "out": str(out), "report": str(out / "report.html")}


@dataclass(frozen=True)
class _Subject:
    """What is compressed on what: the base, how it is talked to, and the documents as it reads them."""

    task: str
    base: Base
    classes: Classes | None
    digest: str
    documents: Examples
    seed: int
    enlarged: bool


def _subject(
    model: str,
    adapter: Path,
    data: Sequence[str],
    watch: Watch,
    *,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    **reading: Any,
) -> _Subject:
    task = trained_task([adapter], reading.pop("task", None))
    asked = as_trained([adapter], reading, task)
    check_sources(task, data)
    loading = {"dtype": dtype, "device": device, "storage": asked.pop("storage")}
    with watch.stage(f"loading {model}"):
        loaded, classes = load_for(model, task, trained_classes([adapter], task), **loading)
    base = with_tokens_of(loaded, [adapter], force=force)
    reader = reader_for(base, classes, **asked)
    with watch.stage("reading the documents") as advance:
        read = reader.read(data, "test", lambda rows, share: advance(share))
    return _Subject(task, base, classes, reader.digest, read.corpus, asked["seed"], base is not loaded)


def _worth(said: str) -> Worth:
    known: tuple[Worth, ...] = get_args(Worth)
    for worth in known:
        if worth == said:
            return worth
    raise SpecError(f"no worth {said!r}{nearest(said, known)}", hint=", ".join(known))


def _command(model: str, adapter: Path, data: Sequence[str], out: Path, worth: str, tolerance: str) -> str:
    files = [word for source in data for word in ("--data", source)]
    told = ["--model", model, *files, "--out", str(out), "--worth", worth, "--tolerance", tolerance]
    return shlex.join(["rankwise", "compress", str(adapter), *told])


def _tell(found: Compression, place: Path, watch: Watch) -> None:
    """The evidence: the second half's documents, the report and the card."""
    write_text(place / "evaluation.json", json_text(found.evaluation.record(), indent=1) + "\n")
    with watch.stage("writing the report"):
        write_report(place)
        write_card(place)
