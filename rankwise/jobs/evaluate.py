"""The base against adapters on a file of documents: what `rankwise evaluate` does."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from rankwise.data.corpus import Corpus
from rankwise.data.intake import Overlong
from rankwise.data.prepare import prepare
from rankwise.data.template import Template, TrainOn
from rankwise.engine.evaluate import Evaluation, evaluate
from rankwise.errors import AdapterMismatchError, DataError, SpecError, listing
from rankwise.formats.record import read_record
from rankwise.frozen.load import Base, load_base
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Advance, Watch
from rankwise.kernels.sizes import Storage
from rankwise.surgery.bank import Bank


def run_evaluation(
    model: str,
    adapters: Sequence[Path],
    data: Sequence[str],
    watch: Watch,
    *,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    **reading: Any,
) -> dict[str, Any]:
    """Losses of the base and of every adapter on the same documents, with paired 95 % intervals.

    Args:
        reading: `max_length`, `overlong`, `train_on`, `storage`, as `rankwise train` has them; None is what all
            adapters were trained with, and where they differ or do not say, what `rankwise train` does by itself.

    Returns:
        `{"documents", "tokens", "base": {"loss"}, "adapters": [{"name", "loss", "delta": {"mean", "low", "high"}}],
        "truncated", "dropped", "unused"}`, in nats per supervised token; an adapter is named by its folder.  The last
        three say what of the rows was not measured, as `data.intake.Report` does.

    Raises:
        DataError: losses that are not finite, and the documents; or bad rows.
        RankwiseError: of every other kind.
    """
    data = [expanduser(source) for source in data]
    adapters = [folder.expanduser() for folder in adapters]
    names = folder_names(adapters)
    asked = as_trained(adapters, reading)
    with watch.stage(f"loading {model}"):
        base = load_base(model, dtype=dtype, device=device, storage=asked["storage"])
    base = with_tokens_of(base, adapters, force=force)
    template = Template(base.tokenizer, asked["train_on"])
    with watch.stage("reading the documents") as advance:
        found = prepare(
            data,
            template,
            asked["max_length"],
            overlong=asked["overlong"],
            progress=lambda rows, share: advance(share),
        )
    with Bank(base.model) as bank:
        for name, folder in zip(names, adapters, strict=True):
            load_adapter(bank, name, folder, base, template, force=force)
        with watch.stage("evaluating") as advance:
            summary = evaluate_finite(bank, names, found.corpus, advance).summary()
    report = found.report
    return summary | {"truncated": report.truncated, "dropped": report.dropped, "unused": report.unused}


def evaluate_finite(bank: Bank, names: Sequence[str], corpus: Corpus, advance: Advance) -> Evaluation:
    """The comparison, whose every number is one.

    Raises:
        DataError: losses that are not finite; names the first documents.
    """
    with np.errstate(all="ignore"):  # what is not finite is told below, by document
        found = evaluate(bank, names, corpus, progress=lambda done, of: advance(done / of))
    problems = []
    for name, losses in zip(("base", *names), (found.base, *found.losses), strict=True):
        bad = np.flatnonzero(~np.isfinite(losses))
        problems += [f"{corpus.origin(int(i))}: {name}" for i in bad]
    if problems:
        raise DataError(
            f"the loss is not a finite number on these documents:\n{listing(problems)}",
            hint="--dtype float32 helps where numbers were too large for the format; else leave the adapter out",
        )
    return found


_TRAINED: dict[str, tuple[TypeAdapter[Any], Any]] = {
    "max_length": (TypeAdapter(Annotated[int, Field(ge=2)]), 2048),
    "overlong": (TypeAdapter(Overlong), "truncate"),
    "train_on": (TypeAdapter(TrainOn), "all"),
    "storage": (TypeAdapter(Storage), "dense"),
}


def as_trained(adapters: Sequence[Path], asked: dict[str, Any]) -> dict[str, Any]:
    """Each setting as asked for, else as in the training of all adapters, else as training has it by itself."""
    if unknown := asked.keys() - _TRAINED.keys():
        raise SpecError(f"no setting of reading: {', '.join(sorted(unknown))}", hint=", ".join(_TRAINED))
    records = [read_record(folder) or {} for folder in adapters]
    tables = [{row.get("name"): row.get("value") for row in record.get("settings", [])} for record in records]
    chosen = {}
    for name, (kind, default) in _TRAINED.items():
        values = [table.get(name) for table in tables]
        agreed = values[0] if values and all(value == values[0] for value in values) else None
        try:
            chosen[name] = kind.validate_python(agreed if asked.get(name) is None else asked[name], strict=True)
        except ValidationError:
            if asked.get(name) is not None:
                raise SpecError(f"{name} = {asked[name]!r} is none that `rankwise train` takes") from None
            chosen[name] = default
    return chosen


def load_adapter(bank: Bank, name: str, folder: Path, base: Base, template: Template, *, force: bool) -> None:
    """Loads an adapter and checks that the model is talked to as in training.

    Raises:
        AdapterMismatchError: another base, or another chat template or tokenizer, unless `force`.
    """
    bank.load(name, folder, force=force)
    record = read_record(folder) or {}
    trained_with = record.get("template", {}).get("digest")
    if trained_with not in (None, template.digest) and not force:
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
