"""Differences between candidates, when documents and seeds are both a sample.

A candidate that was trained with S seeds and judged on n documents has summed losses `[S, n]`; seeds (start, order,
dropout) and documents are shared by all candidates, so that what they have in common falls out of a difference.  Of two
candidates, d is the difference `[S, n]`, w the judged items `[n]`, and

    D = Σ d / (S·Σ w)                                                    nats per judged item
    r = (d - D·w)·n / Σ w                                                the ratio's linear part, of mean 0

is taken apart as a two-way layout without replication (Searle, Casella and McCulloch 1992, §4.4): mean squares between
seeds, between documents and of the rest.  Both are random, so the variance of D is

    (MS_seeds + MS_documents - MS_rest) / (S·n)

and no less than either of the first two alone would make it.  Its degrees of freedom are Satterthwaite's (1946), and
intervals are Student's.  With one seed the share of seeds cannot be seen in d; it is then taken from elsewhere
(`Noise`), or the statement holds for that seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from rankwise.errors import DataError

_POWER = 0.8


@dataclass(frozen=True)
class Noise:
    """The variance of one training's loss over seeds, on the same documents, and how well it is known.

    Attributes:
        variance: of nats per judged item.
        freedom: degrees of freedom.
    """

    variance: float
    freedom: float

    @classmethod
    def of(cls, losses: np.ndarray, items: np.ndarray) -> Noise:
        """From one candidate's summed losses `[S, n]`.

        Raises:
            DataError: fewer than two seeds.
        """
        if len(losses) < 2:
            raise DataError(f"what seeds do needs two of them at least, there are {len(losses)}")
        return cls(float((losses.sum(1) / items.sum()).var(ddof=1)), len(losses) - 1.0)

    @classmethod
    def pooled(cls, noises: Sequence[Noise]) -> Noise:
        """Of several candidates whose noise is taken to be one."""
        freedom = sum(noise.freedom for noise in noises)
        return cls(sum(noise.variance * noise.freedom for noise in noises) / freedom, freedom)


@dataclass(frozen=True)
class Estimate:
    """A difference and how sure it is.

    Attributes:
        mean: nats per judged item; negative where the first candidate is better.
        error: its standard error.
        freedom: degrees of freedom of that.
    """

    mean: float
    error: float
    freedom: float

    def quantile(self, share: float) -> float:
        """The end below which so much of what is possible lies."""
        return self.mean + self.error * float(stdtrit(self.freedom, share))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided."""
        return self.quantile((1 - confidence) / 2), self.quantile((1 + confidence) / 2)

    def upper(self, confidence: float = 0.95) -> float:
        """One-sided: with this confidence it is no more."""
        return self.quantile(confidence)

    def p_value(self) -> float:
        """Of no difference, two-sided."""
        if not self.error:
            return 1.0 if not self.mean else 0.0
        return 2 * float(stdtr(self.freedom, -abs(self.mean) / self.error))

    @property
    def detectable(self) -> float:
        """The smallest true difference that a two-sided test at 5 % would find four times in five."""
        return self.error * float(stdtrit(self.freedom, 0.975) + stdtrit(self.freedom, _POWER))


def difference(first: np.ndarray, second: np.ndarray, items: np.ndarray, noise: Noise | None = None) -> Estimate:
    """`first` against `second`.

    Args:
        first, second: summed losses `[S, n]` with the same seeds on the same documents.
        items: judged items of each document, `[n]`.
        noise: of one training; with it the seeds' share is what two independent trainings have, whatever the S
            differences say, which may be too few to say anything.

    Raises:
        DataError: fewer than two documents, or arrays of other shapes.
    """
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] != len(items):
        raise DataError(f"losses of {first.shape} and {second.shape} on {len(items)} documents are not paired")
    seeds, documents = first.shape
    if documents < 2:
        raise DataError(f"an interval needs at least two documents, there are {documents}")
    apart = first - second
    mean = float(apart.sum() / (seeds * items.sum()))
    rest = (apart - mean * items) * (documents / items.sum())
    by_seed, by_document = rest.mean(1), rest.mean(0)
    of_documents = seeds * float(by_document @ by_document) / (documents - 1)
    if noise is not None:
        parts = ((of_documents / (seeds * documents), documents - 1.0), (2 * noise.variance / seeds, noise.freedom))
        return _estimate(mean, sum(part for part, _ in parts), parts)
    if seeds == 1:
        return _estimate(mean, of_documents / documents, [(of_documents / documents, documents - 1.0)])
    of_seeds = documents * float(by_seed @ by_seed) / (seeds - 1)
    left = rest - by_seed[:, None] - by_document
    of_rest = float((left * left).sum()) / ((seeds - 1) * (documents - 1))
    whole = max(of_seeds + of_documents - of_rest, of_seeds, of_documents) / (seeds * documents)
    scale = seeds * documents
    terms = (
        (of_seeds / scale, seeds - 1.0),
        (of_documents / scale, documents - 1.0),
        (of_rest / scale, (seeds - 1.0) * (documents - 1.0)),
    )
    return _estimate(mean, whole, terms)


def beyond(first: np.ndarray, draws: np.ndarray, items: np.ndarray, noise: Noise | None = None) -> Estimate:
    """`first` against the distribution that K `draws` come from, and not against their mean alone.

    Were `first` one more draw, it would lie off the mean of the others by s²·(1 + 1/K) in variance, s² that of draws,
    known with K - 1 degrees of freedom.  What documents and seeds do to the difference comes on top: a part of it is in
    s² already, which errs on the safe side.

    Args:
        first: summed losses `[S, n]`.
        draws: `[K, S, n]`, with the same seeds on the same documents.
        items, noise: as of `difference`.

    Raises:
        DataError: fewer than two draws; or as `difference`.
    """
    if len(draws) < 2:
        raise DataError(f"a distribution needs two draws at least, there are {len(draws)}")
    apart = difference(first, draws.mean(0), items, noise)
    between = float((draws.sum((1, 2)) / (len(first) * items.sum())).var(ddof=1)) * (1 + 1 / len(draws))
    terms = ((apart.error**2, apart.freedom), (between, len(draws) - 1.0))
    return _estimate(apart.mean, apart.error**2 + between, terms)


def _estimate(mean: float, variance: float, terms: Sequence[tuple[float, float]]) -> Estimate:
    """With Satterthwaite's degrees of freedom of the terms that the variance is made of."""
    spread = sum(term**2 / freedom for term, freedom in terms)
    freedom = variance**2 / spread if spread else terms[0][1]
    return Estimate(mean, math.sqrt(variance), max(freedom, min(f for _, f in terms)))
