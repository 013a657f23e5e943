"""The advisor: which learning rate, which layers, which rank are enough for this base and these documents.

    count    what there is to learn from, and where the ladder of ranks lies        nothing is trained
    noise    seeds of one adapter  ──▶ the smallest difference that can be seen     before anything is compared
    rate     a ladder of learning rates at one rank, halved from rung to rung       each rung a whole run
    targets  attention, mlp, all linear layers with as many parameters
    ladder   ranks at one alpha and that rate, each at full length                  ranks are never raced
    methods  what else was put on the list
    confirm  the chosen rank and the best, with more seeds, on documents that no choice has looked at
    ship     what the chosen adapter does without is taken out of it

All candidates of a step see the same documents in the same order from the same seeds, so that what they have in common
falls out of their differences (`statistics.py`).  Alpha is the same for all ranks: with B = 0 and Adam, curves depend
on s·σ_A·lr_B and σ_A/lr_A alone, and at one alpha the best rate hardly moves with the rank (arXiv:2602.06204, g = 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Run
from rankwise.errors import DataError
from rankwise.reports.search import STEPS
from rankwise.search.budget import Budget
from rankwise.search.rule import SHARE, Standing, bounds, chosen_in, lowest, smallest, standings
from rankwise.search.shipping import ship
from rankwise.search.statistics import Noise, difference
from rankwise.search.study import Candidate, Found
from rankwise.search.trials import Trials
from rankwise.search.truncation import truncated

_EXTENDED = 3  # rates beyond either end of the ladder that are tried at most
_RANKS = (1, 2, 4, 8, 16, 32, 64)
_LARGEST = 256  # that a ladder is extended to by itself


@dataclass
class Advisor:
    """The state of the questions: each answer is one of the `record`'s keys, as search.json has them.

    Attributes:
        trials: made and remembered.
        spec: what candidates have in common; its rank, alpha and targets are where the search begins.
        run: how they learn; its rate is the middle of the ladder.
        budget: how much each question may cost.
        parameters: of a preset of targets, its parameters for each rank.
        ranks: of the ladder; empty for those that `count` finds.
        methods: other candidates by name: what of the spec and of the run is other.
        record: answers so far.
        noise: of one training, once it is measured.
        given: the ranks of the ladder were said, and it is not made longer.
    """

    trials: Trials
    spec: LoraSpec
    run: Run
    budget: Budget
    parameters: Mapping[str, int]
    ranks: tuple[int, ...] = ()
    methods: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(STEPS))
    noise: Noise | None = None
    given: bool = False

    # ── candidates ───────────────────────────────────────────────────────────────────────────────────────────────

    def candidate(self, rank: int | None = None, lr: float | None = None, targets: str | None = None) -> Candidate:
        """With what is other than where the search stands."""
        spec = self.spec.model_copy(
            update={"rank": rank or self.spec.rank, "targets": targets if targets is not None else self.spec.targets}
        )
        run = self.run.model_copy(update={"lr": lr or self.run.lr})
        return Candidate(f"r {spec.rank}, {run.lr:.3g}, {_layers(spec)}", spec, run)

    def losses(self, found: Sequence[Sequence[Found]], which: str = "choose") -> list[np.ndarray | None]:
        """Of each candidate, `[S, n]`; None where any of its seeds failed."""
        stacked = []
        for row in found:
            own = [getattr(one, which) for one in row]
            stacked.append(None if any(losses is None for losses in own) else np.stack(own))
        return stacked

    def mean(self, losses: np.ndarray | None, which: str = "choose") -> float | None:
        return None if losses is None else float(losses.sum() / (len(losses) * self.trials.items(which).sum()))

    def gain(self, losses: np.ndarray, which: str = "choose") -> dict[str, float]:
        """Of the base over a candidate, nats per judged item; positive where the candidate is better."""
        base = np.broadcast_to(self.trials.base(which), losses.shape)
        found = difference(losses, base, self.trials.items(which))
        low, high = found.interval()
        return {"mean": -found.mean, "low": -high, "high": -low}

    # ── the steps ────────────────────────────────────────────────────────────────────────────────────────────────

    def count(self) -> None:
        """Where the ladder lies: as many parameters as there are tokens to learn is the most that can be of use."""
        documents = self.trials.documents
        each = self.parameters[self._layers]
        supervised = int(documents.train.supervised_counts().sum())
        top = min(max(_power(supervised / each), 16), 64)
        self.given = bool(self.ranks)
        ranks = self.ranks or tuple(rank for rank in _RANKS if top / 16 <= rank <= top)
        base = {which: float(self.trials.base(which).sum() / self.trials.items(which).sum()) for which in _PARTS}
        self.ranks = tuple(sorted(ranks))
        self.record["count"] = {
            "targets": self._layers,
            "parameters_per_rank": each,
            "base": base,
            "ranks": list(self.ranks),
        }

    def measure_noise(self) -> None:
        """What seeds alone do, and so what can be seen: told before anything is compared."""
        own = self.candidate()
        found = self.trials.made("noise", [own], range(self.budget.noise_seeds), self.budget.noise_share)
        (losses,) = self.losses(found)
        if losses is None:
            raise DataError(
                f"{own.name}: training fails at the rate where the search begins", hint="lower --lr, a third say"
            )
        items = self.trials.items("choose")
        self.noise = Noise.of(losses, items)
        # Two trainings that differ in nothing but the seed: the first against the second of every pair.
        apart = difference(losses[:-1], losses[1:], items, self.noise)
        gain = self.gain(losses)
        self.record["noise"] = {
            "name": own.name,
            "rank": own.spec.rank,
            "share": self.budget.noise_share,
            "losses": [float(row.sum() / items.sum()) for row in losses],
            "deviation": self.noise.variance**0.5,
            "detectable": apart.detectable,
            "gain": gain,
            "tolerance": max(apart.error, SHARE * max(gain["mean"], 0.0)),
        }

    def find_rate(self) -> None:
        """Successive halving; a best one at an end of what was tried is a reason to try further."""
        alive = [self.run.lr * 2.0**power for power in self.budget.powers]
        rungs = []
        for share in self.budget.rungs:
            rung = self._rung(sorted(alive), share)
            learnt = [(one.loss, lr) for one, lr in zip(rung.standing, rung.rates, strict=True) if one.loss is not None]
            stay = max(2, len(rung.rates) // 2) if rung.learns else len(rung.rates)
            alive = [lr for _, lr in sorted(learnt)[:stay]]
            points = [
                {"lr": lr, "status": status, **own.told(), "kept": lr in alive}
                for lr, own, status in zip(rung.rates, rung.standing, rung.statuses, strict=True)
            ]
            rungs.append({"share": share, "points": points})
        near = [own.enough or own.verdict == "cannot tell" for own in rung.standing]
        alike = [lr for lr, close in zip(rung.rates, near, strict=True) if close]
        self.run = self.run.model_copy(update={"lr": rung.rates[rung.best]})
        self.record["rate"] = {
            "rank": self.spec.rank,
            "best": rung.rates[rung.best],
            "interior": rung.learns and not rung.at_edge,
            "alike": alike,
            "rungs": rungs,
        }

    def _rung(self, rates: list[float], share: float) -> _Rung:
        """Rates of one length, with neighbours of the best until it has one on either side.

        Where even the best is not measurably better than the base, the length says nothing about rates (the lower one
        is, the nearer it stays to the base), and none is tried beyond.
        """
        for extended in range(_EXTENDED + 1):
            found = self.trials.made("rate", [self.candidate(lr=lr) for lr in rates], [0], share)
            losses = self.losses(found)
            best = lowest(self._means(losses))
            gain = self.gain(_known(losses[best]))
            standing = standings(losses, self.trials.items("choose"), gain["mean"], self.noise)
            rung = _Rung(rates, standing, [row[0].status for row in found], best, gain["low"] > 0)
            if not rung.at_edge or not rung.learns or extended == _EXTENDED:
                break
            rates = sorted([*rates, rates[best] * (0.5 if best == 0 else 2.0)])
        return rung

    def _means(self, losses: Sequence[np.ndarray | None]) -> list[float | None]:
        means = [self.mean(own) for own in losses]
        if all(mean is None for mean in means):
            raise DataError("training failed for every candidate of a step", hint="lower --lr, and look at the data")
        return means

    def compare_targets(self) -> None:
        """With as many parameters each; what the search began with stays unless another is measurably better."""
        share = self.budget.targets
        if share is None or self._layers not in _TARGETS:
            return
        total = self.spec.rank * self.parameters[self._layers]
        names = [name for name in _TARGETS if self.parameters.get(name)]
        ranks = {name: max(1, round(total / self.parameters[name])) for name in names}
        found = self.trials.made("targets", [self.candidate(ranks[n], targets=n) for n in names], [0], share)
        losses = self.losses(found)
        best = lowest(self._means(losses))
        gain = self.gain(_known(losses[best]))["mean"]
        standing = standings(losses, self.trials.items("choose"), gain, self.noise)
        begun = names.index(self._layers)
        chosen = names[best] if standing[begun].verdict in ("worse", "failed") else self._layers
        points = [
            {"targets": name, "rank": ranks[name], "parameters": ranks[name] * self.parameters[name]}
            | {"status": row[0].status, **one.told(), "verdict": one.verdict}
            for name, one, row in zip(names, standing, found, strict=True)
        ]
        self.record["targets"] = {"best": names[best], "chosen": chosen, "points": points}
        self.spec = self.spec.model_copy(update={"targets": chosen})

    def climb(self) -> None:
        """Ranks at full length; or, where that is not paid for, one run at the largest, cut to smaller ones."""
        self._truncate()
        if not self.budget.ladder:
            self.spec = self.spec.model_copy(update={"rank": self.record["truncation"]["chosen"]})
            return
        items = self.trials.items("choose")
        while True:
            ranks = list(self.ranks)
            found = self.trials.made("ladder", [self.candidate(rank) for rank in ranks], [0], 1.0)
            losses = self.losses(found)
            best = lowest(self._means(losses))
            if best < len(ranks) - 1 or self.given or ranks[-1] >= _LARGEST:
                break
            self.ranks = (*self.ranks, 2 * ranks[-1])
        gain = self.gain(_known(losses[best]))["mean"]
        standing = standings(losses, items, gain, self.noise)
        often = chosen_in(losses, items, gain, self.noise)
        chosen = smallest(standing)
        each = self.parameters[self._layers]
        self.record["ladder"] = {
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
        self.spec = self.spec.model_copy(update={"rank": ranks[chosen]})

    def _truncate(self) -> None:
        """The largest rank's adapter, cut to each smaller one at every site alike: an upper bound on what is needed."""
        top = self.candidate(self.ranks[-1])
        (row,) = self.trials.made("ladder", [top], [0], 1.0)
        (whole,) = self.losses([row])
        if whole is None or self.spec.form != "lora":
            if not self.budget.ladder:
                raise DataError(f"{top.name}: training fails at the largest rank", hint="take smaller --ranks")
            return
        adapter = self.trials.adapter("ladder", top, 0)
        losses = truncated(self.trials.bank, adapter, self.ranks, self.trials.documents.choose, self.trials.tell)
        items, gain = self.trials.items("choose"), self.gain(whole)["mean"]
        standing = standings([own[None] for own in losses], items, gain, None, best=len(losses) - 1)
        points = [
            {"rank": rank, "loss": one.loss, "delta": bounds(one.delta) or _NONE, "within": one.enough}
            for rank, one in zip(self.ranks, standing, strict=True)
        ]
        told = {"rank": top.spec.rank, "chosen": self.ranks[smallest(standing)], "tolerance": standing[-1].tolerance}
        self.record["truncation"] = told | {"points": points}

    def try_methods(self) -> None:
        """Each at three rates around the one that was found; it is better only if that is measured."""
        if not self.methods:
            return
        share, lr = self.budget.rungs[-1], self.run.lr
        rates = (lr / 2, lr, 2 * lr)
        arms = {"as found": ({}, {}), **self.methods}
        found, losses = {}, {}
        for name, (of_spec, of_run) in arms.items():
            candidates = [
                Candidate(
                    f"{name}, {rate:.3g}",
                    LoraSpec(**{**self.spec.model_dump(), **of_spec}),
                    Run(**{**self.run.model_dump(), **of_run, "lr": rate}),
                )
                for rate in rates
            ]
            tried = self.trials.made("methods", candidates, [0], share)
            means = [self.mean(own) for own in self.losses(tried)]
            best = lowest(means) if any(mean is not None for mean in means) else 1
            found[name], losses[name] = tried[best][0], self.losses(tried)[best]
        own = losses["as found"]
        if own is None:
            raise DataError("training failed at the rate that was found", hint="look at the trials in the report")
        standing = standings(
            list(losses.values()), self.trials.items("choose"), self.gain(own)["mean"], self.noise, best=0
        )
        points = [
            {"name": name, "status": found[name].status, **one.told(), "verdict": one.better}
            for name, one in zip(losses, standing, strict=True)
            if name in self.methods
        ]
        self.record["methods"] = {"points": points}

    def confirm(self) -> None:
        """The chosen rank and the best one, with every seed, on documents that no choice has looked at."""
        ladder, seeds = self.record["ladder"], range(self.budget.confirm_seeds)
        chosen = self.spec.rank
        ranks = sorted({chosen, ladder["best"]} if ladder is not None else {chosen, self.ranks[-1]})
        found = self.trials.made("confirm", [self.candidate(rank) for rank in ranks], seeds, 1.0)
        losses = self.losses(found, "confirm")
        if any(own is None for own in losses):
            raise DataError("training failed with another seed at the rate that was found", hint="take a lower --lr")
        there = [own for own in losses if own is not None]
        items, reference = (
            self.trials.items("confirm"),
            len(ranks) - 1 if ladder is None else ranks.index(ladder["best"]),
        )
        gain = self.gain(there[reference], "confirm")
        noise = self._noise(there, items)
        standing = standings(there, items, gain["mean"], noise, best=reference)
        verdict = "alone" if len(ranks) == 1 else standing[ranks.index(chosen)].verdict
        points = [
            {"rank": rank, "loss": one.loss, "delta": bounds(one.delta), "gain": self.gain(own, "confirm")}
            for rank, one, own in zip(ranks, standing, there, strict=True)
        ]
        told = {"seeds": len(seeds), "tolerance": standing[ranks.index(chosen)].tolerance, "chosen": chosen}
        self.record["confirm"] = told | {"verdict": verdict if verdict != "best" else "alone", "points": points}
        if verdict in ("worse", "cannot tell"):
            self.spec = self.spec.model_copy(update={"rank": ranks[reference]})

    def ship(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Leaves the adapter that was found, smaller where that is shown to cost nothing."""
        adapter = self.trials.adapter("confirm", self.candidate(), 0)
        self.record["ship"] = ship(self.trials, adapter, folder, facts)

    @property
    def found(self) -> dict[str, Any]:
        """Where the search stands, and the two numbers that decide the curve."""
        spec, run = self.spec, self.run
        path, site = next((p, s) for p, s in self.trials.bank.sites.items() if s.role not in ("head", "embedding"))
        spread = 1 / math.sqrt(3 * site.shape.width)  # of A, by kaiming
        scale = spec.scale_at(path)
        return {
            "rank": spec.rank,
            "alpha": spec.alpha,
            "lr": run.lr,
            "targets": self._layers,
            "invariants": {
                "scale x sigma_A x lr_B": scale * spread * run.lr * run.lr_ratio,
                "sigma_A / lr_A": spread / run.lr,
            },
        }

    def _noise(self, losses: Sequence[np.ndarray], items: np.ndarray) -> Noise | None:
        """Of full-length runs where there are several seeds of them, pooled with what the noise step saw."""
        own = [Noise.of(one, items) for one in losses if len(one) > 1]
        return Noise.pooled([*own, *([self.noise] if self.noise is not None else [])]) if own else self.noise

    @property
    def _layers(self) -> str:
        return _layers(self.spec)


def _layers(spec: LoraSpec) -> str:
    return spec.targets if isinstance(spec.targets, str) else "named layers"


@dataclass(frozen=True)
class _Rung:
    """Rates of one length, ascending, and what they gave; `learns`: the best is measurably better than the base."""

    rates: list[float]
    standing: list[Standing]
    statuses: list[str]
    best: int
    learns: bool

    @property
    def at_edge(self) -> bool:
        return self.best in (0, len(self.rates) - 1)


def _known(losses: np.ndarray | None) -> np.ndarray:
    """Of a candidate that did not fail, as the best of several has not."""
    assert losses is not None
    return losses


_PARTS = ("choose", "confirm")
_TARGETS = ("attention", "mlp", "all-linear")
_NONE = {"mean": 0.0, "low": 0.0, "high": 0.0, "upper": 0.0}


def _power(number: float) -> int:
    """The next power of two."""
    return 2 ** math.ceil(math.log2(max(number, 1)))
