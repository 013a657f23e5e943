from hypothesis import given
from hypothesis import strategies as st

from rankwise.adapters.ranks import ranks_by_share

FALLING = st.lists(st.floats(0, 1), min_size=1, max_size=8).map(lambda shares: sorted(shares, reverse=True))


def test_the_rest_goes_to_the_largest_shares_wherever_they_are():
    shares = {"a": [0.9, 0.5, 0.1], "b": [0.4, 0.2, 0.1], "c": [0.99]}
    assert ranks_by_share(shares, 4) == {"a": 2, "b": 1, "c": 1}
    assert ranks_by_share(shares, 5) == {"a": 2, "b": 2, "c": 1}
    assert ranks_by_share(shares, 9) == {"a": 3, "b": 3, "c": 1}


def test_equals_are_given_in_the_order_of_the_sites():
    assert ranks_by_share({"q": [0.5, 0.3], "k": [0.5, 0.3], "v": [0.5, 0.3]}, 5) == {"q": 2, "k": 2, "v": 1}


@given(st.dictionaries(st.text(max_size=3), FALLING, min_size=1), st.integers(1, 60))
def test_the_total_is_kept_between_one_each_and_all_there_is(shares, total):
    ranks = ranks_by_share(shares, total)
    assert list(ranks) == list(shares)
    assert all(1 <= rank <= len(shares[path]) for path, rank in ranks.items())
    assert sum(ranks.values()) == min(max(total, len(shares)), sum(map(len, shares.values())))
    given = [share for path, rank in ranks.items() for share in shares[path][1:rank]]
    left = [share for path, rank in ranks.items() for share in shares[path][rank:]]
    assert not given or not left or min(given) >= max(left)
