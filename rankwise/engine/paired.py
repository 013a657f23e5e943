"""Is one model better than another on the same documents, and how sure is that?

The difference is nats per supervised token over all documents: Σ (a_i - b_i) / Σ w_i, with a_i, b_i the summed losses
of document i and w_i its supervised tokens.  Its interval comes from resampling whole documents (paired bootstrap,
Efron & Tibshirani 1993, §8.3 and §13): tokens of one document are not independent, so documents are the units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rankwise.errors import DataError

RESAMPLES = 10_000
_AT_ONCE = 2_000_000  # document weights drawn at a time: memory does not grow with the number of documents


@dataclass(frozen=True)
class Difference:
    """Mean and interval, nats per supervised token; negative where the first model is better."""

    mean: float
    low: float
    high: float
    confidence: float


def paired_difference(
    first: np.ndarray, second: np.ndarray, tokens: np.ndarray, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """`first` against `second`: summed losses `[D]` of the same documents, `tokens` `[D]` supervised in each.

    Raises:
        DataError: fewer than two documents.
    """
    if len(first) < 2:
        raise DataError(
            f"an interval needs at least two documents, there are {len(first)}",
            hint="evaluate on more documents; 200 or more give a useful interval",
        )
    gaps = first - second
    generator = np.random.Generator(np.random.PCG64(seed))
    chunk = max(1, _AT_ONCE // len(gaps))
    means = np.empty(RESAMPLES)
    for at in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - at)
        drawn = generator.integers(len(gaps), size=(size, len(gaps)))
        means[at : at + size] = gaps[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(gaps.sum() / tokens.sum()), float(low), float(high), confidence)
