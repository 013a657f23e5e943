"""The base against adapters on a file of documents: what `rankwise evaluate` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.data.prepare import prepare
from rankwise.data.template import Template
from rankwise.engine.evaluate import evaluate
from rankwise.errors import AdapterMismatchError, SpecError
from rankwise.formats.record import read_record
from rankwise.frozen.load import Base, load_base
from rankwise.jobs.watch import Watch
from rankwise.surgery.bank import Bank


def run_evaluation(
    model: str,
    adapters: Sequence[Path],
    data: Sequence[str],
    watch: Watch,
    *,
    max_length: int = 2048,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Losses of the base and of every adapter on the same documents, with paired 95 % intervals.

    Returns:
        `{"documents", "tokens", "base": {"loss"}, "adapters": [{"name", "loss", "delta": {"mean", "low", "high"}}]}`,
        in nats per supervised token; an adapter is named by its folder.

    Raises:
        RankwiseError: of every kind.
    """
    names = folder_names(adapters)
    with watch.stage(f"loading {model}"):
        base = load_base(model, dtype=dtype, device=device)
    template = Template(base.tokenizer)
    with watch.stage("reading the documents") as advance:
        corpus = prepare(list(data), template, max_length, progress=lambda rows, share: advance(share)).corpus
    with Bank(base.model) as bank:
        for name, folder in zip(names, adapters, strict=True):
            load_adapter(bank, name, folder, base, template, force=force)
        with watch.stage("evaluating") as advance:
            return evaluate(bank, names, corpus, progress=lambda done, of: advance(done / of)).summary()


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
