"""The documents of a run: learnt from, judged by, compared on, and apart from each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.data.examples import Examples
from rankwise.data.prepare import Prepared
from rankwise.data.replay import Replay
from rankwise.data.split import held_back, occurring, overlap
from rankwise.errors import DataError, RankwiseWarning
from rankwise.jobs.reader import Reader
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.watch import Watch

_HELD_BACK, _HELD_BACK_AT_MOST = 0.05, 500
Read = Callable[[Sequence[str], str, str], Prepared]


@dataclass(frozen=True)
class Documents:
    """What is learnt from, judged by, and compared on; with the files and counts of each.

    Of what is learnt from the last documents are old ones, if `replay` says so.
    """

    train: Examples
    valid: Examples
    test: Examples
    facts: dict[str, Any]
    replay: Replay | None = None

    @property
    def epoch_tokens(self) -> float:
        """Tokens of an epoch; old documents, which differ from epoch to epoch, count as they are on average."""
        lengths = self.train.lengths()
        if self.replay is None:
            return float(lengths.sum())
        fresh = len(lengths) - self.replay.documents
        return float(lengths[:fresh].sum() + lengths[fresh:].mean() * self.replay.count(fresh))


def read_documents(request: TrainRequest, reader: Reader, watch: Watch) -> Documents:
    """Training, validation and test documents; without a validation file some are held back.

    Old documents that are mixed in are split as well: what is held back of their file is left alone, as it was when the
    file itself was trained on with the same seed, and so is what this run judges by.

    Raises:
        DataError: bad rows, all listed; or validation documents that are also trained on.
    """

    def read(sources: Sequence[str], title: str, part: str) -> Prepared:
        with watch.stage(title) as advance:
            return reader.read(sources, part, lambda rows, share: advance(share))

    old = [request.replayed[0]] if request.replay is not None else []
    found = read([*request.data, *old], "reading the documents", "train")
    is_old = found.corpus.origins[:, 0] >= len(request.data) if old else np.zeros(len(found.corpus), dtype=np.bool_)
    fresh = np.flatnonzero(~is_old)
    parts = {"train": found.report.to_json()}
    train = found.corpus.subset(fresh) if old else found.corpus
    if request.valid is None:
        held = _held_back(train, request)
        train, valid = train.subset(np.flatnonzero(~held)), train.subset(np.flatnonzero(held))
        fresh = fresh[~held]
        # What was cut or dropped was so before the split: it is counted once, with the part that is trained on.
        parts["valid"] = parts["train"] | counts(valid) | _NONE_LOST | {"held_back": True}
    else:
        judged = read([request.valid], "reading the validation documents", "valid")
        valid, parts["valid"] = judged.corpus, judged.report.to_json()
    parts["train"] |= counts(train)
    test = valid
    if request.test is not None:
        last = read([request.test], "reading the test documents", "test")
        test, parts["test"] = last.corpus, last.report.to_json()
    replay = None
    if old:
        kept, parts["replay"] = _old(found, np.flatnonzero(is_old), [valid, test], request)
        train = found.corpus.subset(np.concatenate([fresh, kept]))
        replay = Replay(documents=len(kept), share=request.replayed[1])
        parts["replay"]["each_epoch"] = replay.count(len(fresh))
        _warn_of_few(replay, len(fresh), old[0])
    for title, corpus in (("validation", valid), ("test", test)):
        seen = overlap(train, corpus)
        if seen:
            raise DataError(
                f"{seen} of {len(corpus)} {title} documents are also trained on; the comparison would prove nothing",
                hint="take them out of one file, or leave out --valid and a part of the documents is held back",
            )
    return Documents(train, valid, test, {name: _facts(report) for name, report in parts.items()}, replay)


def _held_back(corpus: Examples, request: TrainRequest) -> np.ndarray:
    share = request.hold_back or min(_HELD_BACK, _HELD_BACK_AT_MOST / len(corpus))
    return held_back(corpus, max(share, 2 / max(4, len(corpus))), request.seed)


def _old(
    found: Prepared, numbers: np.ndarray, judged: Sequence[Examples], request: TrainRequest
) -> tuple[np.ndarray, dict[str, Any]]:
    """Of the old documents, by their numbers in the corpus, those that may be learnt from; and the counts of them.

    Raises:
        DataError: there are none.
    """
    source = request.replayed[0]
    if not len(numbers):
        raise DataError(f"{source}: no documents to mix in", hint="leave out --replay, or name another file")
    corpus = found.corpus.subset(numbers)
    held, judging = _held_back(corpus, request), occurring(corpus, judged)
    kept = numbers[~(held | judging)]
    if not len(kept):
        raise DataError(f"{source}: all documents to mix in are also judged by", hint="name another file for --replay")
    told = {"held_back_of_it": int(held.sum()), "judged_by": int((judging & ~held).sum())}
    files = {source: found.report.files[source]}
    return kept, {"files": files} | counts(found.corpus.subset(kept)) | _NONE_LOST | told


def _warn_of_few(replay: Replay, fresh: int, source: str) -> None:
    count = replay.count(fresh)
    wanted = round(fresh * replay.share / (1 - replay.share))
    if count < wanted:
        warnings.warn(
            f"{source}: {count:,} documents to mix in, and a share of {replay.share:g} would be {wanted:,} an epoch; "
            f"all are taken, a share of {count / (count + fresh):.2g}",
            RankwiseWarning,
            stacklevel=3,
        )


_NONE_LOST: dict[str, Any] = {"truncated": 0, "dropped": {}, "unused": {}}


def counts(examples: Examples) -> dict[str, int]:
    """Documents, their tokens, and the items of them that are judged."""
    lengths, supervised = examples.lengths(), examples.supervised_counts()
    return {"documents": len(examples), "tokens": int(lengths.sum()), "supervised": int(supervised.sum())}


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    files = [{"path": path, "sha256": digest} for path, digest in report["files"].items()]
    kept = ("documents", "tokens", "supervised", "truncated", "dropped", "unused", "held_back", *_OF_REPLAY)
    return {"files": files, **{name: report[name] for name in kept if name in report}}


_OF_REPLAY = ("each_epoch", "held_back_of_it", "judged_by")
