"""Whether what was chosen holds: with every seed, on documents that no choice has looked at."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.search.allocation import ends, sentence
from rankwise.search.case import Case
from rankwise.search.rule import bounds, standings
from rankwise.search.statistics import difference


def confirm(case: Case) -> None:
    """The chosen rank and the best one; before that, whether ranks by layer are better here too.

    Where the budget pays for it, the chosen rank's neighbours on the ladder too: they are told of, and decide nothing,
    for these documents choose nothing.  One that fails is named.

    Raises:
        DataError: training fails with another seed, or losses are not finite numbers.
    """
    ladder, seeds = case.record["ladder"], range(case.budget.confirm_seeds)
    if case.spec.rank_pattern:
        _confirm_allocation(case, seeds)
    chosen, best = case.spec.rank, case.ranks[-1] if ladder is None else ladder["best"]
    ranks = sorted({chosen, best, *_neighbours(case)})
    found = case.trials.confirmed("confirm", [case.candidate(rank) for rank in ranks], seeds)
    losses = dict(zip(ranks, case.losses(found, "confirm"), strict=True))
    there = {rank: own for rank, own in losses.items() if own is not None}
    if not {chosen, best} <= there.keys():
        raise case.failed(found)
    gain, noise = (
        case.gain(there[best], "confirm"),
        case.noise_with([there[rank] for rank in sorted({chosen, best})], "confirm"),
    )
    items, first = case.trials.items("confirm"), [*there].index(best)
    standing = dict(zip(there, standings([*there.values()], items, gain["mean"], noise, best=first), strict=True))
    verdict = "alone" if chosen == best else standing[chosen].verdict
    points = [
        {"rank": rank, "loss": one.loss, "delta": bounds(one.delta), "verdict": one.verdict}
        | {"gain": case.gain(there[rank], "confirm")}
        for rank, one in standing.items()
    ]
    failed = [rank for rank in ranks if rank not in there]
    told = {"seeds": len(seeds), "tolerance": standing[chosen].tolerance, "chosen": chosen, "failed": failed}
    case.record["confirm"] = told | {"verdict": verdict, "points": points}
    if verdict in ("worse", "cannot tell"):
        case.spec = case.spec.model_copy(update={"rank": best, "rank_pattern": {}})


def _neighbours(case: Case) -> list[int]:
    """The next smaller and the next larger rank of the ladder that did not fail."""
    if not case.budget.neighbours:
        return []
    there = [point["rank"] for point in case.record["ladder"]["points"] if point["verdict"] != "failed"]
    at = there.index(case.spec.rank)
    return there[max(0, at - 1) : at] + there[at + 1 : at + 2]


def _confirm_allocation(case: Case, seeds: Sequence[int]) -> None:
    """Ranks by layer stay only if they are better than the uniform rank on these documents as well."""
    plain = case.spec.model_copy(update={"rank_pattern": {}})
    allocated = case.candidate()
    found = case.trials.confirmed("confirm", [allocated, case.candidate_of(plain)], seeds)
    own, uniform = case.losses(found, "confirm")
    if own is None or uniform is None:
        raise case.failed(found)
    apart = difference(own, uniform, case.trials.items("confirm"), case.noise_with([own, uniform], "confirm"))
    told = case.record["allocation"]
    told["confirmed"] = ends(apart)
    if apart.interval()[1] >= 0:
        told["verdict"] = "not confirmed"
        case.spec = plain
    told["sentence"] = sentence(told)
