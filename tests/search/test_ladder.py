"""Halving the ladder of ranks: which one is trained next."""

from math import ceil, log2

import pytest

from rankwise.search.ladder import between

LADDER = (2, 4, 8, 16, 32, 64)


def climbed(first, enough):
    """What is tried, where every rank from `enough` on is enough, and what is chosen."""
    tried = sorted({first, LADDER[-1]})
    while True:
        chosen = next(number for number, rank in enumerate(tried) if rank >= enough)
        more = between(LADDER, tried, chosen)
        if not more:
            return tried, tried[chosen]
        tried = sorted({*tried, *more})


@pytest.mark.parametrize("first", LADDER[:-1])
@pytest.mark.parametrize("enough", LADDER)
def test_halving_ends_at_the_smallest_that_is_enough_beside_one_that_is_not(first, enough):
    tried, chosen = climbed(first, enough)
    assert chosen == enough
    assert enough == LADDER[0] or LADDER[LADDER.index(enough) - 1] in tried
    assert len(tried) <= 2 + ceil(log2(len(LADDER)))


def test_what_turns_out_too_small_is_gone_on_from():
    """A rank that seemed enough until a better one was trained: the gap above it is looked into then."""
    assert between(LADDER, (4, 16, 64), 1) == [8]
    assert between(LADDER, (4, 16, 64), 2) == [32]
    assert between(LADDER, (4, 8, 16, 64), 2) == []
    assert between(LADDER, (2, 64), 0) == []
