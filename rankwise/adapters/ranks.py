"""Ranks given out over sites under one total.  Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def ranks_by_share(shares: Mapping[str, Sequence[float]], total: int) -> dict[str, int]:
    """The rank of each site: one each, and the rest of the total to the largest shares wherever they are (EVA).

    Args:
        shares: site → what each further rank there is worth, falling; as many as the site may have.
        total: of all ranks; what no site may have is left over.

    >>> ranks_by_share({"a": [0.9, 0.5, 0.1], "b": [0.4, 0.2, 0.1], "c": [0.3]}, 5)
    {'a': 2, 'b': 2, 'c': 1}
    """
    ranks = dict.fromkeys(shares, 1)
    further = [(share, path) for path, own in shares.items() for share in own[1:]]
    further.sort(key=lambda one: -one[0])  # stable: equals in the sites' order
    for _, path in further[: max(0, total - len(ranks))]:
        ranks[path] += 1
    return ranks


def ranks_by_worth(worths: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """The rank of each site: one each, and then always the rank that is worth most for each of its parameters.

    Args:
        worths: site → what each further rank there is worth, falling; as many as the site may have.
        costs: parameters of a rank there.
        budget: parameters of all; a rank that no longer fits is passed over for one that does.

    >>> ranks_by_worth({"a": [9, 8, 1], "b": [6, 5, 4], "c": [2]}, {"a": 1, "b": 2, "c": 2}, 8)
    {'a': 2, 'b': 2, 'c': 1}
    """
    ranks = dict.fromkeys(worths, 1)
    left = budget - sum(costs[path] for path in ranks)
    further = [(worth / costs[path], path) for path, own in worths.items() for worth in own[1:]]
    full = set[str]()  # of these a rank did not fit, and no later one will
    for _, path in sorted(further, key=lambda one: -one[0]):  # stable: equals in the sites' order
        if costs[path] > left or path in full:
            full.add(path)
            continue
        ranks[path] += 1
        left -= costs[path]
    return ranks
