"""How often the right class was said, and how sure that is.

Accuracy has Wilson's interval (Wilson 1927), which holds for few documents and for shares near 0 and 1.  Two models on
the same documents are compared by those that only one of them got right: the difference of accuracies has a bootstrap
interval over documents (`paired.py`), and McNemar's exact test says how likely such a difference is by chance
(McNemar 1947; the binomial form).

Shape letters: D documents, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from rankwise.engine.paired import paired_difference


@dataclass(frozen=True)
class Classified:
    """What a base (or what stands in its place) and adapters said of the same documents.

    Attributes:
        classes: names, by number.
        labels: int64 `[D]`, the right ones.
        base: int64 `[D]`.
        predicted: int64 `[adapters, D]`.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    base: np.ndarray
    predicted: np.ndarray

    def of_base(self) -> dict[str, Any]:
        return scores(self.base, self.labels, len(self.classes))

    def of_adapter(self, row: int) -> dict[str, Any]:
        """Scores, and the difference of accuracies from the base's."""
        own = scores(self.predicted[row], self.labels, len(self.classes))
        return own | {"accuracy_delta": accuracy_difference(self.predicted[row], self.base, self.labels)}


def scores(predicted: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Any]:
    """`accuracy` with its 95 % interval, and `macro_f1`."""
    right = int((predicted == labels).sum())
    low, high = wilson(right, len(labels))
    accuracy = {"value": right / len(labels), "low": low, "high": high}
    return {"accuracy": accuracy, "macro_f1": macro_f1(confusion(predicted, labels, classes))}


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How many documents of each class (down) were said to be of each (across), int64 `[C, C]`."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def macro_f1(counts: np.ndarray) -> float:
    """The mean over classes of 2·right / (said + there), of `confusion`; those neither there nor said are left out."""
    right, both = np.diag(counts), counts.sum(0) + counts.sum(1)
    return float((2 * right[both > 0] / both[both > 0]).mean())


def wilson(right: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share (Wilson's score interval)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / of, z * z / of
    middle, half = share + spread / 2, z * (share * (1 - share) / of + spread / (4 * of)) ** 0.5
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return (0.0 if right == 0 else low), (1.0 if right == of else high)


def mcnemar(only_first: int, only_second: int) -> float:
    """The chance of a difference at least as large where both models are alike: binomial, two sides."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    if not count:
        return 1.0
    steps = np.arange(1, fewer + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((count - steps + 1) / steps))]) - count * np.log(2)
    return float(min(1.0, 2 * np.exp(logs).sum()))


def accuracy_difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of the first model from the second, positive where it is better; and McNemar's p."""
    right, other = first == labels, second == labels
    found = paired_difference(right.astype(float), other.astype(float), np.ones(len(labels), dtype=np.int64))
    p = mcnemar(int((right & ~other).sum()), int((other & ~right).sum()))
    return {"mean": found.mean, "low": found.low, "high": found.high, "mcnemar_p": p}
