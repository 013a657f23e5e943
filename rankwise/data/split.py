"""A part of the documents held back for validation, so that nothing in it was seen in training."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np

from rankwise.data.examples import Examples, Self
from rankwise.errors import DataError


def split(corpus: Self, share: float = 0.1, seed: int = 0) -> tuple[Self, Self]:
    """`(train, valid)`, with about `share` of the documents in `valid` and at least one in each.

    Documents with the same content (tokens, source, picture) stay on one side, and so do documents made of one row.
    Who goes where follows from the documents' content and the seed, not from their order in the file.

    Raises:
        DataError: `share` is not between 0 and 1, or there is only one document, however often.
    """
    held = held_back(corpus, share, seed)
    return corpus.subset(np.flatnonzero(~held)), corpus.subset(np.flatnonzero(held))


def held_back(corpus: Examples, share: float, seed: int) -> np.ndarray:
    """Which documents `split` puts into `valid`, bool `[D]`.

    Raises:
        DataError: as `split`.
    """
    if not 0 < share < 1:
        raise DataError(f"share = {share}, expected a number between 0 and 1, such as 0.1")
    groups = _inseparable(corpus)
    if len(groups) < 2:
        raise DataError(
            f"{len(corpus):,} documents cannot be split: all are the same",
            hint="name a file for validation, or add rows",
        )
    drawn = sorted(groups, key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).digest())
    wanted, taken = share * len(corpus), 0
    valid: list[int] = []
    for group in drawn:
        size = len(groups[group])
        # A group that would overshoot by more than it fills is passed over; the last one is left for training.
        if abs(taken + size - wanted) < abs(taken - wanted) and taken + size < len(corpus):
            valid += groups[group]
            taken += size
    valid = valid or groups[min(drawn, key=lambda group: len(groups[group]))]
    held = np.zeros(len(corpus), dtype=np.bool_)
    held[valid] = True
    return held


def overlap(train: Examples, valid: Examples) -> int:
    """How many documents of `valid` occur in `train`, with the very same content."""
    seen = set(_contents(train))
    return sum(content in seen for content in _contents(valid))


def occurring(corpus: Examples, others: Iterable[Examples]) -> np.ndarray:
    """Which documents of `corpus` occur in others, with the very same content, bool `[D]`."""
    seen = {content for other in others for content in _contents(other)}
    return np.array([content in seen for content in _contents(corpus)], dtype=np.bool_)


def _contents(corpus: Examples) -> list[str]:
    return [hashlib.sha256(corpus.content(i)).hexdigest() for i in range(len(corpus))]


def _inseparable(corpus: Examples) -> dict[str, list[int]]:
    """Documents that must stay together, under the smallest hash among them: same content or same row, or linked so."""
    contents = _contents(corpus)
    root = list(range(len(corpus)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    first: dict[Hashable, int] = {}
    for i, (content, origin) in enumerate(zip(contents, corpus.origins.tolist(), strict=True)):
        for key in (content, tuple(origin)):
            root[find(i)] = find(first.setdefault(key, i))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(corpus)):
        groups[find(i)].append(i)
    return {min(contents[i] for i in group): group for group in groups.values()}
