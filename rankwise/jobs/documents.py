"""The documents of a run: learnt from, judged by, compared on, and apart from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.data.corpus import Corpus
from rankwise.data.prepare import prepare
from rankwise.data.split import overlap, split
from rankwise.data.template import Template
from rankwise.errors import DataError
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.watch import Watch

_HELD_BACK, _HELD_BACK_AT_MOST = 0.05, 500


@dataclass(frozen=True)
class Documents:
    """What is learnt from, judged by, and compared on; with the files and counts of each."""

    train: Corpus
    valid: Corpus
    test: Corpus
    facts: dict[str, Any]


def read_documents(request: TrainRequest, template: Template, watch: Watch) -> Documents:
    """Training, validation and test documents, tokenised; without a validation file some are held back.

    Raises:
        DataError: bad rows, all listed; or validation documents that are also trained on.
    """

    def read(sources: Any, title: str) -> Any:
        with watch.stage(title) as advance:
            return prepare(
                sources,
                template,
                request.max_length,
                overlong=request.overlong,
                progress=lambda rows, share: advance(share),
            )

    found = read(list(request.data), "reading the documents")
    parts = {"train": found.report.to_json()}
    if request.valid is None:
        share = min(_HELD_BACK, _HELD_BACK_AT_MOST / len(found.corpus))
        train_on, valid = split(found.corpus, share=max(share, 2 / max(4, len(found.corpus))), seed=request.seed)
        # What was cut or dropped was so before the split: it is counted once, with the part that is trained on.
        none = {"truncated": 0, "dropped": {}, "unused": {}, "held_back": True}
        parts["valid"] = parts["train"] | _counts(valid) | none
        parts["train"] |= _counts(train_on)
    else:
        held = read(request.valid, "reading the validation documents")
        train_on, valid, parts["valid"] = found.corpus, held.corpus, held.report.to_json()
    test = valid
    if request.test is not None:
        last = read(request.test, "reading the test documents")
        test, parts["test"] = last.corpus, last.report.to_json()
    for title, corpus in (("validation", valid), ("test", test)):
        seen = overlap(train_on, corpus)
        if seen:
            raise DataError(
                f"{seen} of {len(corpus)} {title} documents are also trained on; the comparison would prove nothing",
                hint="take them out of one file, or leave out --valid and a part of the documents is held back",
            )
    return Documents(train_on, valid, test, {name: _facts(report) for name, report in parts.items()})


def _counts(corpus: Corpus) -> dict[str, int]:
    return {"documents": len(corpus), "tokens": len(corpus.tokens), "supervised": int(corpus.supervised.sum())}


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    files = [{"path": path, "sha256": digest} for path, digest in report["files"].items()]
    kept = ("documents", "tokens", "supervised", "truncated", "dropped", "unused", "held_back")
    return {"files": files, **{name: report[name] for name in kept if name in report}}
