"""Where a search stands: what it is about, what has been found so far, and candidates beside that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.look import Spectrum
from rankwise.engine.run import Run
from rankwise.errors import DataError
from rankwise.reports.search import STEPS
from rankwise.search.budget import Budget
from rankwise.search.statistics import Noise, difference
from rankwise.search.study import Candidate, Found
from rankwise.search.trials import Trials


@dataclass
class Case:
    """The state of the questions: each answer is one of the `record`'s keys, as search.json has them.

    Attributes:
        trials: made and remembered.
        spec: what candidates have in common; its rank, alpha and targets are where the search begins.
        run: how they learn; its rate is the middle of the ladder.
        budget: how much each question may cost.
        parameters: of a preset of targets, its parameters for each rank.
        ranks: of the ladder; empty for those that `count` finds.
        methods: other candidates by name: what of the spec and of the run is other.
        allocate: what ranks are given out by, if they are (`activations`, `gradients`).
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
    allocate: Spectrum | None = None
    record: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(STEPS))
    noise: Noise | None = None
    given: bool = False

    def candidate(self, rank: int | None = None, lr: float | None = None, targets: str | None = None) -> Candidate:
        """With what is other than where the search stands; ranks that were given out belong to one rank."""
        changes: dict[str, Any] = {"rank": rank or self.spec.rank}
        changes["targets"] = targets if targets is not None else self.spec.targets
        if any(changes[name] != getattr(self.spec, name) for name in changes):
            changes["rank_pattern"] = {}
        return self.candidate_of(self.spec.model_copy(update=changes), lr)

    def candidate_of(self, spec: LoraSpec, lr: float | None = None) -> Candidate:
        run = self.run.model_copy(update={"lr": lr or self.run.lr})
        given_out = " given out" if spec.rank_pattern else ""
        return Candidate(f"r {spec.rank}{given_out}, {run.lr:.3g}, {layers_of(spec)}", spec, run)

    def losses(self, found: Sequence[Sequence[Found]], which: str = "choose") -> list[np.ndarray | None]:
        """Of each candidate, `[S, n]`; None where any of its seeds failed."""
        stacked = []
        for row in found:
            own = [getattr(one, which) for one in row]
            stacked.append(None if any(losses is None for losses in own) else np.stack(own))
        return stacked

    def mean(self, losses: np.ndarray | None, which: str = "choose") -> float | None:
        return None if losses is None else float(losses.sum() / (len(losses) * self.trials.items(which).sum()))

    def means(self, losses: Sequence[np.ndarray | None]) -> list[float | None]:
        """Of each; None where it failed.

        Raises:
            DataError: all of them failed.
        """
        means = [self.mean(own) for own in losses]
        if all(mean is None for mean in means):
            raise DataError("training failed for every candidate of a step", hint="lower --lr, and look at the data")
        return means

    @staticmethod
    def failed(found: Sequence[Sequence[Found]]) -> DataError:
        """Why there is nothing to compare, of what had learnt well with another seed or on other documents."""
        if any(one.choose is None for row in found for one in row):
            return DataError("training failed with another seed at the rate that was found", hint="take a lower --lr")
        return DataError(
            "losses are not finite numbers on documents to confirm on, though they are on those to choose by",
            hint="--dtype float32 helps where numbers were too large for the format",
        )

    def gain(self, losses: np.ndarray, which: str = "choose") -> dict[str, float]:
        """Of the base over a candidate, nats per judged item; positive where the candidate is better."""
        base = np.broadcast_to(self.trials.base(which), losses.shape)
        found = difference(losses, base, self.trials.items(which))
        low, high = found.interval()
        return {"mean": -found.mean, "low": -high, "high": -low}

    def noise_with(self, losses: Sequence[np.ndarray], which: str) -> Noise | None:
        """Of full-length runs where there are several seeds of them, else what the noise step saw.

        The two are not pooled: at a quarter of the length, or before the rate is found, a training may have learnt so
        little that its seeds hardly differ, and that would speak for runs that do (docs/log.md, 2026-11-26).
        """
        own = [Noise.of(one, self.trials.items(which)) for one in losses if len(one) > 1]
        return Noise.pooled(own) if own else self.noise

    @property
    def layers(self) -> str:
        return layers_of(self.spec)

    @property
    def found(self) -> dict[str, Any]:
        """Where the search stands, and the two numbers that decide the curve."""
        spec, run = self.spec, self.run
        path, site = next((p, s) for p, s in self.trials.bank.sites.items() if s.role not in ("head", "embedding"))
        spread = 1 / math.sqrt(3 * site.shape.width)  # of A, by kaiming
        scale = spec.scale_at(path)
        return {
            "rank": spec.rank,
            "rank_pattern": dict(spec.rank_pattern),
            "alpha": spec.alpha,
            "lr": run.lr,
            "targets": self.layers,
            "invariants": {
                "scale x sigma_A x lr_B": scale * spread * run.lr * run.lr_ratio,
                "sigma_A / lr_A": spread / run.lr,
            },
        }


def layers_of(spec: LoraSpec) -> str:
    return spec.targets if isinstance(spec.targets, str) else "named layers"


def known(losses: np.ndarray | None) -> np.ndarray:
    """Of a candidate that did not fail, as the best of several has not."""
    assert losses is not None
    return losses
