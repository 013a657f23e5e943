"""Which layers, with as many parameters each."""

from __future__ import annotations

from rankwise.search.case import Case, known
from rankwise.search.rule import lowest, standings

_TARGETS = ("attention", "mlp", "all-linear")


def compare_targets(case: Case) -> None:
    """What the search began with stays unless another is measurably better."""
    if not case.budget.targets or case.layers not in _TARGETS:
        return
    total = case.spec.rank * case.parameters[case.layers]
    names = [name for name in _TARGETS if case.parameters.get(name)]
    ranks = {name: max(1, round(total / case.parameters[name])) for name in names}
    found = case.trials.made("targets", [case.candidate(ranks[n], targets=n) for n in names], [0], case.budget.arms)
    losses = case.losses(found)
    best = lowest(case.means(losses))
    gain = case.gain(known(losses[best]))["mean"]
    standing = standings(losses, case.trials.items("choose"), gain, case.noise)
    begun = names.index(case.layers)
    chosen = names[best] if standing[begun].verdict in ("worse", "failed") else case.layers
    points = [
        {"targets": name, "rank": ranks[name], "parameters": ranks[name] * case.parameters[name]}
        | {"status": row[0].status, **one.told(), "verdict": one.verdict}
        for name, one, row in zip(names, standing, found, strict=True)
    ]
    case.record["targets"] = {"best": names[best], "chosen": chosen, "points": points}
    case.spec = case.spec.model_copy(update={"targets": chosen})
