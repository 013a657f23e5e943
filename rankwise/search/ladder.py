"""Which rank: trained at full length, each of the ladder or those that halving it asks for; or a large adapter, cut.

Halving takes for granted that what a rank is not enough for, no smaller one is.  It begins with the largest rank and
the one at which rates were compared; then always the middle one of the ranks that lie between the smallest that is
enough and the next one tried below it, until none does.  What is compared is always of full length.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    _truncate(case)
    if case.budget.ladder == "cut":
        case.spec = case.spec.model_copy(update={"rank": case.record["truncation"]["chosen"]})
        return
    items, ranks = case.trials.items("choose"), _first(case)
    while True:
        found = case.trials.made("ladder", [case.candidate(rank) for rank in ranks], [0], 1.0)
        losses = case.losses(found)
        best = lowest(case.means(losses))
        gain = case.gain(known(losses[best]))["mean"]
        standing = standings(losses, items, gain, case.noise)
        chosen = smallest(standing)
        more = between(case.ranks, ranks, chosen)
        if not more and chosen == len(ranks) - 1 and not case.given and ranks[-1] < _LARGEST:
            more = [2 * ranks[-1]]
            case.ranks = (*case.ranks, *more)
        if not more:
            break
        ranks = sorted([*ranks, *more])
    often = chosen_in(losses, items, gain, case.noise)
    each = case.parameters[case.layers]
    case.record["ladder"] = {
        "best": ranks[best],
        "chosen": ranks[chosen],
        "tolerance": standing[best].tolerance,
        "seeds": 1,
        "untried": [rank for rank in case.ranks if rank not in ranks],
        "points": [
            {"rank": rank, "parameters": rank * each, "status": row[0].status, **one.told(upper=True)}
            | {"verdict": one.verdict, "chosen_in": share}
            for rank, one, row, share in zip(ranks, standing, found, often, strict=True)
        ],
    }
    if case.budget.nested:
        _nest(case)
    case.spec = case.spec.model_copy(update={"rank": ranks[chosen]})


def _first(case: Case) -> list[int]:
    """Ranks that are trained before any is judged: all, or two to begin halving with."""
    if case.budget.ladder == "each":
        return [*case.ranks]
    *below, top = case.ranks
    if not below:
        return [top]
    return [case.spec.rank if case.spec.rank in below else below[len(below) // 2], top]


def between(ladder: Sequence[int], tried: Sequence[int], chosen: int) -> list[int]:
    """The middle one of the ranks between the chosen one and the next that was tried below it, if there are any."""
    below = tried[chosen - 1] if chosen else 0
    gap = [rank for rank in ladder if below < rank < tried[chosen]]
    return gap[(len(gap) - 1) // 2 :][:1]


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
        if case.budget.ladder == "cut":
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
