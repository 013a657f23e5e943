"""Whether what was chosen holds: with every seed, on documents that no choice has looked at."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.errors import DataError
from rankwise.search.allocation import ends, sentence
from rankwise.search.case import Case
from rankwise.search.rule import bounds, standings
from rankwise.search.statistics import difference


def confirm(case: Case) -> None:
    """The chosen rank and the best one; before that, whether ranks by layer are better here too.

    Raises:
        DataError: training fails with another seed.
    """
    ladder, seeds = case.record["ladder"], range(case.budget.confirm_seeds)
    if case.spec.rank_pattern:
        _confirm_allocation(case, seeds)
    chosen = case.spec.rank
    ranks = sorted({chosen, ladder["best"]} if ladder is not None else {chosen, case.ranks[-1]})
    found = case.trials.made("confirm", [case.candidate(rank) for rank in ranks], seeds, 1.0)
    losses = case.losses(found, "confirm")
    if any(own is None for own in losses):
        raise DataError("training failed with another seed at the rate that was found", hint="take a lower --lr")
    there = [own for own in losses if own is not None]
    reference = len(ranks) - 1 if ladder is None else ranks.index(ladder["best"])
    gain = case.gain(there[reference], "confirm")
    noise = case.noise_with(there, "confirm")
    standing = standings(there, case.trials.items("confirm"), gain["mean"], noise, best=reference)
    verdict = "alone" if len(ranks) == 1 else standing[ranks.index(chosen)].verdict
    points = [
        {"rank": rank, "loss": one.loss, "delta": bounds(one.delta), "gain": case.gain(own, "confirm")}
        for rank, one, own in zip(ranks, standing, there, strict=True)
    ]
    told = {"seeds": len(seeds), "tolerance": standing[ranks.index(chosen)].tolerance, "chosen": chosen}
    case.record["confirm"] = told | {"verdict": verdict if verdict != "best" else "alone", "points": points}
    if verdict in ("worse", "cannot tell") and ranks[reference] != chosen:
        case.spec = case.spec.model_copy(update={"rank": ranks[reference], "rank_pattern": {}})


def _confirm_allocation(case: Case, seeds: Sequence[int]) -> None:
    """Ranks by layer stay only if they are better than the uniform rank on these documents as well."""
    plain = case.spec.model_copy(update={"rank_pattern": {}})
    allocated = case.candidate()
    found = case.trials.made("confirm", [allocated, case.candidate_of(plain)], seeds, 1.0)
    own, uniform = case.losses(found, "confirm")
    if own is None or uniform is None:
        raise DataError("training failed with another seed at the rate that was found", hint="take a lower --lr")
    apart = difference(own, uniform, case.trials.items("confirm"), case.noise_with([own, uniform], "confirm"))
    told = case.record["allocation"]
    told["confirmed"] = ends(apart)
    if apart.interval()[1] >= 0:
        told["verdict"] = "not confirmed"
        case.spec = plain
    told["sentence"] = sentence(told)
