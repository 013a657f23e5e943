"""Which learning rate: successive halving, each rung a run of its own length (Jamieson and Talwalkar 2016).

The longer a run, the lower its best rate (Bjorck et al. 2024, arXiv:2409.19913).  A rate that was too high for a short
run is not tried in a longer one; one that was too low for it may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.search.case import Case, known
from rankwise.search.rule import Standing, lowest, standings

_EXTENDED = 3  # rates beyond either end of the ladder that are tried at most


@dataclass(frozen=True)
class _Rung:
    """Rates of one length, ascending, and what they gave.

    `learns`: the best one is measurably better than the base, or its training losses fell.
    """

    rates: list[float]
    standing: list[Standing]
    statuses: list[str]
    best: int
    learns: bool

    @property
    def too_high(self) -> set[float]:
        """Rates above the best one that are measurably worse, or failed."""
        if not self.learns:
            return set()
        above = zip(self.rates[self.best + 1 :], self.standing[self.best + 1 :], strict=True)
        return {lr for lr, own in above if own.verdict in ("worse", "failed")}

    def beyond(self, too_high: set[float]) -> float | None:
        """The rate to try next, beside a best one at an end; `too_high` are known of shorter runs."""
        if self.best == 0:
            return self.rates[0] * 0.5
        higher = self.rates[-1] * 2.0
        return higher if self.best == len(self.rates) - 1 and higher not in too_high else None


def find_rate(case: Case) -> None:
    """Half of the rates stay, and none that is too high; a best one at an end is a reason to go further."""
    alive = [case.run.lr * 2.0**power for power in case.budget.powers]
    rungs: list[dict[str, Any]] = []
    too_high: set[float] = set()
    for share in case.budget.rungs:
        rung = _rung(case, sorted(alive), share, too_high)
        too_high |= rung.too_high
        learnt = [(one.loss, lr) for one, lr in zip(rung.standing, rung.rates, strict=True) if one.loss is not None]
        stay = max(2, len(rung.rates) // 2) if rung.learns else len(rung.rates)
        alive = [lr for _, lr in sorted(learnt) if lr not in too_high][:stay]
        points = [
            {"lr": lr, "status": status, **own.told(), "kept": lr in alive}
            for lr, own, status in zip(rung.rates, rung.standing, rung.statuses, strict=True)
        ]
        rungs.append({"share": case.trials.taken(share), "points": points})
    near = [own.enough or own.verdict == "cannot tell" for own in rung.standing]
    alike = [lr for lr, close in zip(rung.rates, near, strict=True) if close]
    case.run = case.run.model_copy(update={"lr": rung.rates[rung.best]})
    case.record["rate"] = {
        "rank": case.spec.rank,
        "best": rung.rates[rung.best],
        "interior": rung.learns and rung.beyond(too_high) is None,
        "alike": alike,
        "rungs": rungs,
    }


def _rung(case: Case, rates: list[float], share: float, too_high: set[float]) -> _Rung:
    """Rates of one length, with neighbours of the best until it has one on either side, or the higher is `too_high`.

    Where even the best has learnt nothing, the length says nothing about rates (the lower one is, the nearer it stays
    to the base), and none is tried beyond.  One that is no better than the base although its training losses fell has
    learnt its documents by heart, which is a reason to go lower.
    """
    for extended in range(_EXTENDED + 1):
        found = case.trials.made("rate", [case.candidate(lr=lr) for lr in rates], [0], share)
        losses = case.losses(found)
        best = lowest(case.means(losses))
        gain = case.gain(known(losses[best]))
        standing = standings(losses, case.trials.items("choose"), gain["mean"], case.noise)
        learns = gain["low"] > 0 or _fell([loss for _, loss in found[best][0].curve])
        rung = _Rung(rates, standing, [row[0].status for row in found], best, learns)
        beyond = rung.beyond(too_high)
        if beyond is None or not rung.learns or extended == _EXTENDED:
            break
        rates = sorted([*rates, beyond])
    return rung


def _fell(losses: Sequence[float]) -> bool:
    """Whether training losses are lower in their last third than in the first, by more than steps differ."""
    third = len(losses) // 3
    if third < 2:
        return False
    first, last = np.array(losses[:third]), np.array(losses[-third:])
    error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / third)
    return bool(first.mean() - last.mean() > 2 * error)
