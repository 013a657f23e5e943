"""Which rank: each of the ladder, trained at full length; or a large adapter, cut.

No rank is left out because of what others gave: losses are not in the order of ranks where seeds move them more than
ranks do, and a ladder that was halved missed better ranks on two of three data sets (docs/log.md, 2026-11-27).
"""

from __future__ import annotations

from rankwise.adapters.spec import ZERO_STARTS
from rankwise.errors import DataError
from rankwise.search.case import Case, known
from rankwise.search.nested import prefixed
from rankwise.search.rule import bounds, chosen_in, lowest, smallest, standings
from rankwise.search.statistics import difference
from rankwise.search.study import Candidate
from rankwise.search.truncation import truncated

_LARGEST = 256  # that a ladder is extended to by itself
_NONE = {"mean": 0.0, "low": 0.0, "high": 0.0, "upper": 0.0}


def climb(case: Case) -> None:
    """Ranks at full length, and one adapter that learns them all; or, where that is not paid for, one that is cut."""
    if case.budget.cut:
        _truncate(case)
        case.spec = case.spec.model_copy(update={"rank": case.record["truncation"]["chosen"]})
        return
    items = case.trials.items("choose")
    while True:
        ranks = case.ranks
        found = case.trials.made("ladder", [case.candidate(rank) for rank in ranks], [0], 1.0)
        losses = case.losses(found)
        best = lowest(case.means(losses))
        gain = case.gain(known(losses[best]))["mean"]
        standing = standings(losses, items, gain, case.noise)
        chosen = smallest(standing)
        if chosen < len(ranks) - 1 or case.given or ranks[-1] >= _LARGEST:
            break
        case.ranks = (*ranks, 2 * ranks[-1])
    often = chosen_in(losses, items, gain, case.noise)
    each = case.parameters[case.layers]
    case.record["ladder"] = {
        "best": ranks[best],
        "chosen": ranks[chosen],
        "tolerance": standing[best].tolerance,
        "seeds": 1,
        "points": [
            {"rank": rank, "parameters": rank * each, "status": row[0].status, **one.told(upper=True)}
            | {"verdict": one.verdict, "chosen_in": share}
            for rank, one, row, share in zip(ranks, standing, found, often, strict=True)
        ],
    }
    _truncate(case)
    if case.budget.nested:
        _nest(case)
    case.spec = case.spec.model_copy(update={"rank": ranks[chosen]})


def _nest(case: Case) -> None:
    """One adapter of the largest rank, all of whose prefixes learn (`engine/nested.py`); it decides nothing.

    Differences are to the rank of the ladder that it is the prefix of: how much is lost by learning all at once.
    """
    if case.spec.form != "lora" or case.spec.init not in ZERO_STARTS:
        return
    top = case.candidate(case.ranks[-1])
    nested = Candidate(f"{top.name}, nested", top.spec, top.run.model_copy(update={"nested": True}))
    ((found,),) = case.trials.made("ladder", [nested], [0], 1.0)
    if found.choose is None:
        return
    documents, adapter = case.trials.documents.choose, case.trials.adapter("ladder", nested, 0)
    losses = prefixed(case.trials.bank, adapter, case.ranks, documents, case.trials.tell)
    alone = case.losses(case.trials.made("ladder", [case.candidate(rank) for rank in case.ranks], [0], 1.0))
    items, points = case.trials.items("choose"), []
    for rank, own, single in zip(case.ranks, losses, alone, strict=True):
        delta = None if single is None else bounds(difference(own[None], single, items, case.noise))
        points.append({"rank": rank, "loss": case.mean(own[None]), "delta": delta})
    case.record["nested"] = {"rank": top.spec.rank, "points": points}


def _truncate(case: Case) -> None:
    """The largest rank's adapter, cut to each smaller one at every site alike: an upper bound on what is needed."""
    top = case.candidate(case.ranks[-1])
    (row,) = case.trials.made("ladder", [top], [0], 1.0)
    (whole,) = case.losses([row])
    if whole is None or case.spec.form != "lora":
        if case.budget.cut:
            raise DataError(f"{top.name}: training fails at the largest rank", hint="take smaller --ranks")
        return
    adapter = case.trials.adapter("ladder", top, 0)
    losses = truncated(case.trials.bank, adapter, case.ranks, case.trials.documents.choose, case.trials.tell)
    items, gain = case.trials.items("choose"), case.gain(whole)["mean"]
    standing = standings([own[None] for own in losses], items, gain, None, best=len(losses) - 1)
    points = [
        {"rank": rank, "loss": one.loss, "delta": bounds(one.delta) or _NONE, "within": one.enough}
        for rank, one in zip(case.ranks, standing, strict=True)
    ]
    told = {"rank": top.spec.rank, "chosen": case.ranks[smallest(standing)], "tolerance": standing[-1].tolerance}
    case.record["truncation"] = told | {"points": points}
