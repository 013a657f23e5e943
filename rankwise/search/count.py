"""What there is to learn from, and so where the ladder of ranks lies."""

from __future__ import annotations

import math

from rankwise.search.case import Case

_RANKS = (1, 2, 4, 8, 16, 32, 64)
_PARTS = ("choose", "confirm")


def count(case: Case) -> None:
    """As many parameters as there are tokens to learn is the most that can be of use."""
    documents = case.trials.documents
    each = case.parameters[case.layers]
    supervised = int(documents.train.supervised_counts().sum())
    top = min(max(_power(supervised / each), 16), 64)
    case.given = bool(case.ranks)
    ranks = case.ranks or tuple(rank for rank in _RANKS if top / 16 <= rank <= top)
    case.ranks = tuple(sorted(ranks))
    case.record["count"] = {
        "targets": case.layers,
        "parameters_per_rank": each,
        "base": {which: float(case.trials.base(which).sum() / case.trials.items(which).sum()) for which in _PARTS},
        "ranks": list(case.ranks),
    }


def _power(number: float) -> int:
    """The next power of two."""
    return 2 ** math.ceil(math.log2(max(number, 1)))
