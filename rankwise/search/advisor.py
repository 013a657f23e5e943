"""The advisor: which learning rate, which layers, which rank are enough for this base and these documents.

    count       what there is to learn from, and where the ladder of ranks lies        nothing is trained
    noise       seeds of one adapter  ──▶ the smallest difference that can be seen     before anything is compared
    rate        a ladder of learning rates at one rank, halved from rung to rung       each rung a whole run
    targets     attention, mlp, all linear layers with as many parameters
    ladder      ranks at one alpha and that rate, each at full length                  ranks are never raced
    methods     what else was put on the list
    allocation  where it is asked for: that rank's parameters, given out by layer      against uniform and shuffled
    confirm     the chosen rank and the best, with more seeds, on documents that no choice has looked at
    ship        what the chosen adapter does without is taken out of it                against training at those ranks

Each question has a file of its own, and asks it of a `Case`.  All candidates of one see the same documents in the same
order from the same seeds, so that what they have in common falls out of their differences (`statistics.py`).  Alpha is
the same for all ranks: with B = 0 and Adam, curves depend on s·σ_A·lr_B and σ_A/lr_A alone, and at one alpha the best
rate hardly moves with the rank (arXiv:2602.06204, g = 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankwise.reports.search import Step
from rankwise.search.allocation import give_out
from rankwise.search.case import Case
from rankwise.search.confirmation import confirm
from rankwise.search.count import count
from rankwise.search.ladder import climb
from rankwise.search.methods import try_methods
from rankwise.search.noise import measure_noise
from rankwise.search.rate import find_rate
from rankwise.search.shipping import ship
from rankwise.search.targets import compare_targets

_QUESTIONS: dict[Step, Callable[[Case], None]] = {
    "count": count,
    "noise": measure_noise,
    "rate": find_rate,
    "targets": compare_targets,
    "ladder": climb,
    "methods": try_methods,
    "allocation": give_out,
    "confirm": confirm,
}


class Advisor(Case):
    """A case that can be asked, one question after the other."""

    def ask(self, step: Step) -> None:
        """One question, those before it having been asked; `ship` has a call of its own.

        Raises:
            DataError: no candidate learns.
            RankwiseError: of training.
        """
        _QUESTIONS[step](self)

    def ship(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Leaves the adapter that was found, smaller where that is shown to cost nothing."""
        self.record["ship"] = ship(self, folder, facts)
