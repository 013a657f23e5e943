import pytest

from rankwise.reports.paired import pair
from rankwise.reports.run import PerDocument

DETAIL = PerDocument(tokens=(10, 2, 5, 4), base=(20.0, 6.0, 5.0, 4.0), adapters={"a": (10.0, 7.0, 4.0, 4.0)})


def test_differences_are_per_token_and_sorted():
    paired = pair(DETAIL, "a")
    assert paired is not None
    assert paired.differences == (-1.0, -0.2, 0.0, 0.5)
    assert (paired.better, paired.worse, paired.same) == (2, 1, 1)


@pytest.mark.parametrize(("share", "value"), [(0, -1.0), (1, 0.5), (0.5, -0.1), (1 / 3, -0.2)])
def test_quantiles_lie_between_documents(share, value):
    paired = pair(DETAIL, "a")
    assert paired is not None
    assert paired.quantile(share) == pytest.approx(value)


def test_totals_alone_make_no_pairs():
    assert pair(None, "a") is None
