"""The documents of a run: learnt from, judged by, compared on, and apart from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.data.examples import Examples
from rankwise.data.split import overlap, split
from rankwise.errors import DataError
from rankwise.jobs.reader import Reader
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.watch import Watch

_HELD_BACK, _HELD_BACK_AT_MOST = 0.05, 500


@dataclass(frozen=True)
class Documents:
    """What is learnt from, judged by, and compared on; with the files and counts of each."""

    train: Examples
    valid: Examples
    test: Examples
    facts: dict[str, Any]


def read_documents(request: TrainRequest, reader: Reader, watch: Watch) -> Documents:
    """Training, validation and test documents; without a validation file some are held back.

    Raises:
        DataError: bad rows, all listed; or validation documents that are also trained on.
    """

    def read(sources: Any, title: str, part: str) -> Any:
        named = [sources] if isinstance(sources, str) else list(sources)
        with watch.stage(title) as advance:
            return reader.read(named, part, lambda rows, share: advance(share))

    found = read(request.data, "reading the documents", "train")
    parts = {"train": found.report.to_json()}
    if request.valid is None:
        share = request.hold_back or min(_HELD_BACK, _HELD_BACK_AT_MOST / len(found.corpus))
        train_on, valid = split(found.corpus, share=max(share, 2 / max(4, len(found.corpus))), seed=request.seed)
        # What was cut or dropped was so before the split: it is counted once, with the part that is trained on.
        none = {"truncated": 0, "dropped": {}, "unused": {}, "held_back": True}
        parts["valid"] = parts["train"] | counts(valid) | none
        parts["train"] |= counts(train_on)
    else:
        held = read(request.valid, "reading the validation documents", "valid")
        train_on, valid, parts["valid"] = found.corpus, held.corpus, held.report.to_json()
    test = valid
    if request.test is not None:
        last = read(request.test, "reading the test documents", "test")
        test, parts["test"] = last.corpus, last.report.to_json()
    for title, corpus in (("validation", valid), ("test", test)):
        seen = overlap(train_on, corpus)
        if seen:
            raise DataError(
                f"{seen} of {len(corpus)} {title} documents are also trained on; the comparison would prove nothing",
                hint="take them out of one file, or leave out --valid and a part of the documents is held back",
            )
    return Documents(train_on, valid, test, {name: _facts(report) for name, report in parts.items()})


def counts(examples: Examples) -> dict[str, int]:
    """Documents, their tokens, and the items of them that are judged."""
    lengths, supervised = examples.lengths(), examples.supervised_counts()
    return {"documents": len(examples), "tokens": int(lengths.sum()), "supervised": int(supervised.sum())}


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    files = [{"path": path, "sha256": digest} for path, digest in report["files"].items()]
    kept = ("documents", "tokens", "supervised", "truncated", "dropped", "unused", "held_back")
    return {"files": files, **{name: report[name] for name in kept if name in report}}
