"""Ranks given out layer by layer, with the parameters of one rank everywhere, and whether that is worth anything.

    documents ──▶ two halves ──▶ spectra of each, and ranks by them        do the halves give the same?  else not tried
              ──▶ both spectra together ──▶ the ranks that are tried
    trained at full length, with the same seeds, side by side:
        uniform · allocated · shuffled: the same ranks, given to other layers by chance, several times

Spectra are those of a start that looks at documents (`engine/look.py`): of a layer's inputs (EVA, arXiv:2410.07170), or
of the gradient by its weight (GoRA, arXiv:2502.12171).  A direction is worth its share of the one or its square of the
other, for each of its parameters the most are taken.  Alpha stays, as it does on the ladder.

An allocation is recommended only if it is measurably better than the uniform rank and than what chance gives out: a
gain that any uneven ranks have says nothing about these.  And it stays only if `confirm` finds it better as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from rankwise.adapters.ranks import ranks_by_worth
from rankwise.adapters.spec import LoraSpec, exactly
from rankwise.data.corpus import Corpus
from rankwise.data.split import split
from rankwise.engine.look import Look, Spectrum
from rankwise.engine.run import Start
from rankwise.errors import SpecError
from rankwise.search.case import Case
from rankwise.search.rule import bounds
from rankwise.search.statistics import Estimate, Noise, beyond, difference
from rankwise.search.study import Candidate

RELIABLE = 0.8  # Spearman's correlation of what the halves give out; below, noise would be given out
_LAYERS = 6  # with another of their size, below which a correlation says nothing
_MOST = 2  # times the uniform rank that a layer may come to, as EVA's authors have it
_SHUFFLED = 4  # one more than the usual three: an interval of K draws has K - 1 degrees of freedom
_DRAWN = 256  # permutations, of which the one with the nearest number of parameters is taken
_NAME = "probe"

Ranks = dict[str, int]


def give_out(case: Case) -> None:
    """Where it is asked for; the search goes on with the allocation if it is better.

    Raises:
        SpecError: the documents are for another task than a causal language model's, or layers cannot be looked at.
        DataError: no documents in a half, or training fails for the uniform rank.
    """
    if case.allocate is None:
        return
    rank, bank = case.spec.rank, case.trials.bank
    halves, worths = _spectra(case, case.allocate)
    costs = {path: bank.sites[path].shape.parameters(1) for path in worths}
    budget = rank * sum(costs.values())
    ranks = ranks_by_worth(worths, costs, budget)
    first, second = (ranks_by_worth(half, costs, budget) for half in halves)
    agreed = agreement(first, second, costs)
    spent = sum(ranks[path] * costs[path] for path in ranks)
    told: dict[str, Any] = {"by": case.allocate, "rank": rank, "ranks": ranks, "agreement": agreed, "least": RELIABLE}
    told |= {"parameters": {"uniform": budget, "allocated": spent}, "seeds": case.budget.confirm_seeds}
    others = shuffled(ranks, costs, case.trials.loop.seed)
    if set(ranks.values()) == {rank} or len(others) < 2:
        told |= {"verdict": "nothing to give out", "points": [], "against": None}
    elif agreed is None or agreed < RELIABLE:
        told |= {"verdict": "not reliable", "points": [], "against": None}
    else:
        told |= _tried(case, ranks, others, costs)
    case.record["allocation"] = told | {"sentence": sentence(told)}


# ── what is given out ────────────────────────────────────────────────────────────────────────────────────────────────


def _spectra(case: Case, by: Spectrum) -> tuple[list[dict[str, list[float]]], dict[str, list[float]]]:
    """What each direction of each layer is worth, by either half of the documents, and by both together."""
    trials, corpus, loop = case.trials, case.trials.documents.train, case.trials.loop
    if not isinstance(corpus, Corpus):
        raise SpecError(
            "ranks are given out by what documents are to a causal language model, and these are for another task",
            hint="leave out --allocate",
        )
    spec = case.spec.model_copy(update={"init": "kaiming", "form": "lora", "rank_pattern": {}})
    start = Start(micro_tokens=loop.micro_tokens, checkpointing=loop.checkpointing)
    halves = []
    for number, half in enumerate(split(corpus, 0.5, loop.seed)):
        title = f"allocation: looking at {by}, {('first', 'second')[number]} half of the documents"
        look = Look(trials.bank, _NAME, spec, half, loop.seed, start, partial(trials.tell, title))
        halves.append(look.worths(by, _MOST * spec.rank))
    reached = [path for path in halves[0] if path in halves[1]]
    both = [{path: half[path] for path in reached} for half in halves]
    return both, {path: _mean(*(half[path] for half in both)) for path in reached}


def _mean(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Of as many directions as both have: few tokens have few."""
    return [(one + other) / 2 for one, other in zip(first, second, strict=False)]


def agreement(first: Mapping[str, int], second: Mapping[str, int], costs: Mapping[str, int]) -> float | None:
    """Spearman's correlation of two allocations among layers whose ranks cost the same; None where there are too few.

    Each rank is taken from the mean of its layer's size: that small layers get more because they cost less is the same
    whatever the documents say, and would make noise look like agreement.
    """
    alike = [path for path in first if sum(costs[path] == costs[other] for other in first) > 1]
    apart = []
    for ranks in (first, second):
        means = {cost: np.mean([ranks[p] for p in alike if costs[p] == cost]) for cost in {costs[p] for p in alike}}
        apart.append([float(ranks[path] - means[costs[path]]) for path in alike])
    if len(alike) < _LAYERS or any(np.ptp(own) == 0 for own in apart):
        return None
    return float(spearmanr(*apart).statistic)


def shuffled(ranks: Mapping[str, int], costs: Mapping[str, int], seed: int) -> list[Ranks]:
    """The same ranks given to layers by chance, with as nearly as many parameters; each another one, none as it was."""
    chance, paths = np.random.Generator(np.random.PCG64(seed)), list(ranks)
    own, each = np.array([ranks[path] for path in paths]), np.array([costs[path] for path in paths])
    found = {tuple(own.tolist())}
    chosen: list[Ranks] = []
    for _ in range(_SHUFFLED):
        drawn = [own[chance.permutation(len(own))] for _ in range(_DRAWN)]
        new = [one for one in drawn if tuple(one.tolist()) not in found]
        if not new:
            break
        nearest = min(new, key=lambda one: abs(int(one @ each) - int(own @ each)))
        found.add(tuple(nearest.tolist()))
        chosen.append(dict(zip(paths, nearest.tolist(), strict=True)))
    return chosen


def patterned(spec: LoraSpec, ranks: Mapping[str, int]) -> LoraSpec:
    """With these ranks; alpha stays."""
    return spec.model_copy(update={"rank_pattern": {exactly(p): r for p, r in ranks.items() if r != spec.rank}})


# ── whether it is worth anything ─────────────────────────────────────────────────────────────────────────────────────


def _tried(case: Case, ranks: Ranks, others: Sequence[Ranks], costs: Mapping[str, int]) -> dict[str, Any]:
    """All of them, trained; the case goes on with the allocation where it is better than either."""
    uniform = dict.fromkeys(costs, case.spec.rank)
    given = {"uniform": uniform, "allocated": ranks, **{f"shuffled {n}": o for n, o in enumerate(others, start=1)}}
    specs = {name: patterned(case.spec, own) for name, own in given.items()}
    lr, layers = f"{case.run.lr:.3g}", case.layers
    candidates = [Candidate(f"r {case.spec.rank} {n}, {lr}, {layers}", spec, case.run) for n, spec in specs.items()]
    found = case.trials.made("allocation", candidates, range(case.budget.confirm_seeds), 1.0)
    losses = dict(zip(specs, case.losses(found), strict=True))
    if losses["uniform"] is None:
        raise case.failed(found)
    items = case.trials.items("choose")
    noise = case.noise_with([own for own in losses.values() if own is not None], "choose")
    against = judged(losses, items, noise)
    better = against is not None and all(one.interval()[1] < 0 for one in against.values())
    if better:
        case.spec = specs["allocated"]
    points = []
    for name, row in zip(specs, found, strict=True):
        own, spent = losses[name], sum(given[name][path] * costs[path] for path in costs)
        status = next((one.status for one in row if one.choose is None), "finished")
        apart = None if own is None or name == "uniform" else difference(own, losses["uniform"], items, noise)
        points.append(
            {"name": name, "parameters": spent, "status": status} | {"loss": case.mean(own), "delta": ends(apart)}
        )
    told = None if against is None else {name: ends(one) for name, one in against.items()}
    return {"verdict": "recommended" if better else "not recommended", "points": points, "against": told}


def judged(
    losses: Mapping[str, np.ndarray | None], items: np.ndarray, noise: Noise | None
) -> dict[str, Estimate] | None:
    """The allocation against the uniform rank, and against the distribution of shuffled ones; None where one failed.

    Args:
        losses: summed, `[S, n]`, of `uniform`, `allocated` and `shuffled …`.
        items, noise: as of `difference`.
    """
    allocated, uniform = losses["allocated"], losses["uniform"]
    chance = [own for name, own in losses.items() if name.startswith("shuffled") and own is not None]
    if allocated is None or uniform is None or len(chance) < 2:
        return None
    return {
        "uniform": difference(allocated, uniform, items, noise),
        "shuffled": beyond(allocated, np.stack(chance), items, noise),
    }


def ends(delta: Estimate | None) -> dict[str, float] | None:
    found = bounds(delta)
    if found is not None:
        del found["upper"]  # what is decided by are two-sided intervals
    return found


def sentence(told: Mapping[str, Any]) -> str:
    """What is to be said of an allocation."""
    by, rank = f"ranks given out by {told['by']}", f"rank {told['rank']} everywhere"
    if told["verdict"] == "nothing to give out":
        return f"{by} were not tried: they are {rank}, or nearly so"
    if told["verdict"] == "not reliable":
        agreed = told["agreement"]
        said = "cannot be compared" if agreed is None else f"agree by {agreed:.2f} only, {told['least']:g} is the least"
        return f"{by} are not reliable and were not tried: those of two halves of the documents {said}"
    if told["against"] is None:
        return f"{by} are not recommended: training failed with them"
    apart = {
        name: f"{one['mean']:+.4f} nats (95 % {one['low']:+.4f} to {one['high']:+.4f})"
        for name, one in told["against"].items()
    }
    said = f"{apart['uniform']} against {rank}, {apart['shuffled']} against the same ranks shuffled"
    if told["verdict"] == "not confirmed":
        confirmed = told["confirmed"]
        held = f"{confirmed['mean']:+.4f} nats (95 % {confirmed['low']:+.4f} to {confirmed['high']:+.4f})"
        return f"{by} are not recommended: {said}, but {held} against {rank} on documents that no choice looked at"
    return f"{by} are {told['verdict']}: {said}"
