"""The rule by which a rank is chosen, and how sure the choice is.

    smallest rank whose difference to the best has an upper 95 % bound within
    ε = max(one standard error of that difference, a share of the gain over the base)

What is shown is that a rank is not worse by more than ε, not merely that nobody could tell: few documents make the
bound wide, and a larger rank is kept.  How often another sample of documents and seeds would have led to each rank is
found by doing the whole selection again on resampled ones (Efron and Tibshirani 1993, §6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.search.statistics import Estimate, Noise, difference

SHARE = 0.02  # of the gain over the base
_RESAMPLES = 400


@dataclass(frozen=True)
class Standing:
    """A candidate beside the best.

    Attributes:
        loss: nats per judged item, the mean over seeds; None where training failed.
        delta: to the best; None for the best itself.
        tolerance: ε of this difference.
        verdict: `best`, `not worse`, `worse`, `cannot tell` or `failed`.
    """

    loss: float | None
    delta: Estimate | None
    tolerance: float
    verdict: str

    @property
    def enough(self) -> bool:
        return self.verdict in ("best", "not worse")

    @property
    def better(self) -> str:
        """`better`, `worse`, `cannot tell` or `failed`: of a candidate beside one that is no candidate itself."""
        if self.delta is None:
            return "failed"
        low, high = self.delta.interval()
        return "better" if high < 0 else "worse" if low > 0 else "cannot tell"

    def told(self, *, upper: bool = False) -> dict[str, Any]:
        """As reports have it."""
        delta = bounds(self.delta)
        if delta is not None and not upper:
            delta.pop("upper")
        return {"loss": self.loss, "delta": delta}


def bounds(delta: Estimate | None) -> dict[str, float] | None:
    """A difference as reports have it: two-sided 95 % interval, and the one-sided upper bound."""
    if delta is None:
        return None
    low, high = delta.interval()
    return {"mean": delta.mean, "low": low, "high": high, "upper": delta.upper()}


def standings(
    losses: Sequence[np.ndarray | None],
    items: np.ndarray,
    gain: float,
    noise: Noise | None,
    *,
    best: int | None = None,
    share: float = SHARE,
) -> list[Standing]:
    """Every candidate beside the best, in the order given (for ranks: ascending).

    Args:
        losses: of each candidate, summed, `[S, n]`; None where training failed.
        items: judged items of each document, `[n]`.
        gain: of the best over the base, nats per judged item.
        noise: of one training, for the share of seeds.
        best: which one is taken as the best; by itself the one with the lowest mean.
        share: of the gain that may be lost.
    """
    means = [None if own is None else float(own.sum() / (len(own) * items.sum())) for own in losses]
    top = best if best is not None else lowest(means)
    reference = losses[top]
    found = []
    for number, (own, mean) in enumerate(zip(losses, means, strict=True)):
        if own is None or reference is None:
            found.append(Standing(None, None, 0.0, "failed"))
            continue
        if number == top:
            found.append(Standing(mean, None, share * max(gain, 0.0), "best"))
            continue
        delta = difference(own, reference, items, noise)
        tolerance = max(delta.error, share * gain)
        found.append(Standing(mean, delta, tolerance, _verdict(delta, tolerance)))
    return found


def _verdict(delta: Estimate, tolerance: float) -> str:
    if delta.upper() <= tolerance:
        return "not worse"
    return "worse" if delta.interval()[0] > 0 else "cannot tell"


def lowest(means: Sequence[float | None]) -> int:
    """Which is the lowest of those that there are."""
    return min((mean, number) for number, mean in enumerate(means) if mean is not None)[1]


def smallest(found: Sequence[Standing]) -> int:
    """The first, of ascending ranks, that is enough."""
    return next(number for number, standing in enumerate(found) if standing.enough)


def chosen_in(
    losses: Sequence[np.ndarray | None],
    items: np.ndarray,
    gain: float,
    noise: Noise | None,
    *,
    share: float = SHARE,
    seed: int = 0,
) -> list[float]:
    """How often each candidate is the smallest that is enough, over resampled documents and seeds; sums to 1.

    Documents are drawn with replacement.  What other seeds would have done is drawn for each candidate from the noise
    of one training; without a noise, documents alone are resampled.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    there = [own for own in losses if own is not None]
    counts = np.zeros(len(losses))
    spread = np.sqrt(noise.variance / len(there[0])) if noise is not None else 0.0
    for _ in range(_RESAMPLES):
        drawn = generator.integers(len(items), size=len(items))
        moved = generator.normal(scale=spread, size=len(losses)) if spread else np.zeros(len(losses))
        again = [
            None if own is None else own[:, drawn] + shift * items[drawn]
            for own, shift in zip(losses, moved, strict=True)
        ]
        counts[smallest(standings(again, items[drawn], gain, noise, share=share))] += 1
    return (counts / _RESAMPLES).tolist()
