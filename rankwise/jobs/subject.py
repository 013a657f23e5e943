"""What a run is about: the model, how it is talked to, and what it is to tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.data.classes import Classes
from rankwise.data.tokeniser import add_tokens
from rankwise.frozen.load import Base
from rankwise.jobs.reader import Reader, check_sources, learnt_classes, load_for, reader_for
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Watch
from rankwise.jobs.whole import check_adapters


@dataclass(frozen=True)
class Subject:
    """What a run is about.

    Attributes:
        base: the model, and the tokenizer with every token that the adapter has for itself.
        reader: how the model is talked to.
        classes: what it is to tell apart; None for a task without.
        new_tokens: numbers of those that were added for this run.
        enlarged: the tokenizer is not the base's own, and travels with the adapter.
    """

    base: Base
    reader: Reader
    classes: Classes | None
    new_tokens: tuple[int, ...]
    enlarged: bool


def subject_of(request: TrainRequest, watch: Watch) -> Subject:
    """The model with its reader; what is wrong with the sources is found out before anything is loaded."""
    earlier = list(filter(None, [request.continue_from, request.onto]))
    check_adapters(earlier, "train it further as --model, with --form full or not")
    beside = {part: source for part in ("valid", "test") if (source := getattr(request, part)) is not None}
    if request.replay is not None:
        beside["replay"] = request.replayed[0]
    check_sources(request.task, [*request.data, *beside.values()])
    classes = learnt_classes(request.task, request.data, beside)
    with watch.stage(f"loading {request.model}"):
        loaded, classes = load_for(request.model, request.task, classes, **_loading(request))
    base = with_tokens_of(loaded, earlier, force=request.force)
    new_tokens = add_tokens(base.tokenizer, request.add_tokens) if request.add_tokens else ()
    reading: dict[str, Any] = {name: getattr(request, name) for name in ("max_length", "overlong", "train_on", "seed")}
    reader = reader_for(base, classes, **reading)
    return Subject(base, reader, classes, new_tokens, bool(new_tokens) or base is not loaded)


def _loading(request: TrainRequest) -> dict[str, Any]:
    """What `load_base` is told besides the task."""
    ranks = [request.rank, *request.rank_pattern.values()]
    remainder = max(ranks) if request.init == "loftq" and not request.whole else 0
    told = {name: getattr(request, name) for name in ("dtype", "device", "storage", "seed")}
    return told | {"remainder_rank": remainder}
