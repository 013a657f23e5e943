"""Whether another method is better than what was found without it."""

from __future__ import annotations

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Run
from rankwise.errors import DataError
from rankwise.search.case import Case
from rankwise.search.rule import lowest, standings
from rankwise.search.study import Candidate


def try_methods(case: Case) -> None:
    """Each at three rates around the one that was found; it is better only if that is measured.

    Raises:
        DataError: training fails without any of them.
    """
    if not case.methods:
        return
    lr = case.run.lr
    rates = (lr / 2, lr, 2 * lr)
    arms = {"as found": ({}, {}), **case.methods}
    found, losses = {}, {}
    for name, (of_spec, of_run) in arms.items():
        candidates = [
            Candidate(
                f"{name}, {rate:.3g}",
                LoraSpec(**{**case.spec.model_dump(), **of_spec}),
                Run(**{**case.run.model_dump(), **of_run, "lr": rate}),
            )
            for rate in rates
        ]
        tried = case.trials.made("methods", candidates, [0], case.budget.arms)
        means = [case.mean(own) for own in case.losses(tried)]
        best = lowest(means) if any(mean is not None for mean in means) else 1
        found[name], losses[name] = tried[best][0], case.losses(tried)[best]
    own = losses["as found"]
    if own is None:
        raise DataError("training failed at the rate that was found", hint="look at the trials in the report")
    standing = standings(list(losses.values()), case.trials.items("choose"), case.gain(own)["mean"], case.noise, best=0)
    points = [
        {"name": name, "status": found[name].status, **one.told(), "verdict": one.better}
        for name, one in zip(losses, standing, strict=True)
        if name in case.methods
    ]
    case.record["methods"] = {"points": points}
