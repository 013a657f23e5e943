"""A long series made short enough to draw and smooth enough to read, without hiding what it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.reports.run import Curve

MOST_POINTS = 400
SMOOTHED_SHARE = 0.06


@dataclass(frozen=True)
class Series:
    xs: tuple[float, ...]
    ys: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.xs) == len(self.ys)


def finite(xs: Sequence[float], ys: Sequence[float | None]) -> Series:
    """The points that can be drawn: a value that is missing, infinite or not a number is left out."""
    kept = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and math.isfinite(y)]
    return Series(tuple(x for x, _ in kept), tuple(y for _, y in kept))


def training_losses(curve: Curve) -> tuple[Series, Series]:
    """What each step lost, raw and smoothed."""
    seen = [step for step in curve.steps if step.loss is not None and math.isfinite(step.loss)]
    raw = finite([step.step for step in seen], [step.loss for step in seen])
    return raw, smooth(raw, [step.supervised for step in seen])


def window(points: int) -> int:
    """How many neighbours a smoothed point speaks for: a share of the series, odd, at least one."""
    return max(1, round(points * SMOOTHED_SHARE)) | 1


def smooth(series: Series, weights: Sequence[float]) -> Series:
    """A centred weighted mean, so that the curve does not lag behind as a running average does.

    Weighted by supervised tokens it is the true loss over the window; at the ends the window is what is there.
    """
    half = window(len(series.xs)) // 2
    sums, masses = [0.0], [0.0]
    for y, weight in zip(series.ys, weights, strict=True):
        sums.append(sums[-1] + y * weight)
        masses.append(masses[-1] + weight)
    ys = []
    for index, y in enumerate(series.ys):
        first, last = max(0, index - half), min(len(series.ys), index + half + 1)
        mass = masses[last] - masses[first]
        ys.append((sums[last] - sums[first]) / mass if mass else y)
    return Series(series.xs, tuple(ys))


def thin(series: Series, most: int = MOST_POINTS) -> Series:
    """At most `most` points: each stretch keeps its lowest and its highest, so no spike disappears."""
    total = len(series.xs)
    if total <= most:
        return series
    stretches = most // 2
    kept: list[int] = []
    for stretch in range(stretches):
        indices = range(stretch * total // stretches, (stretch + 1) * total // stretches)
        kept += sorted({min(indices, key=series.ys.__getitem__), max(indices, key=series.ys.__getitem__)})
    return Series(tuple(series.xs[i] for i in kept), tuple(series.ys[i] for i in kept))
