"""What seeds alone do, and so what can be seen: told before anything is compared."""

from __future__ import annotations

from rankwise.errors import DataError
from rankwise.search.case import Case
from rankwise.search.rule import SHARE
from rankwise.search.statistics import Noise, difference


def measure_noise(case: Case) -> None:
    """Trainings that differ in nothing but the seed.

    Raises:
        DataError: one of them fails.
    """
    own, budget = case.candidate(), case.budget
    found = case.trials.made("noise", [own], range(budget.noise_seeds), budget.noise_share)
    (losses,) = case.losses(found)
    if losses is None:
        raise DataError(
            f"{own.name}: training fails at the rate where the search begins", hint="lower --lr, a third say"
        )
    items = case.trials.items("choose")
    case.noise = Noise.of(losses, items)
    # Two trainings that differ in nothing but the seed: the first against the second of every pair.
    apart = difference(losses[:-1], losses[1:], items, case.noise)
    gain = case.gain(losses)
    case.record["noise"] = {
        "name": own.name,
        "rank": own.spec.rank,
        "share": case.trials.taken(budget.noise_share),
        "losses": [float(row.sum() / items.sum()) for row in losses],
        "deviation": case.noise.variance**0.5,
        "detectable": apart.detectable,
        "gain": gain,
        "tolerance": max(apart.error, SHARE * max(gain["mean"], 0.0)),
    }
