import pytest

from rankwise.engine.paired import Difference
from rankwise.errors import DataError, SpecError
from rankwise.search.tolerance import Tolerance

GAIN = Difference(0.5, 0.4, 0.6, 0.95)


@pytest.mark.parametrize(
    ("text", "nats"), [("2%", 0.01), (" 50 % ", 0.25), ("0.003", 0.003), ("1e-4", 1e-4), (".5%", 0.0025), ("3", 3.0)]
)
def test_a_share_of_the_gain_or_nats(text, nats):
    assert Tolerance.said(text).nats(GAIN) == pytest.approx(nats)


@pytest.mark.parametrize("text", ["", "%", "two", "1.2.3", "-1", "0", "0%", "100%", "nan", "inf", "2%%", "1e999"])
def test_what_is_no_tolerance_is_refused(text):
    with pytest.raises(SpecError):
        Tolerance.said(text)


@pytest.mark.parametrize("low", [0.0, -0.1])
def test_a_share_of_a_gain_that_may_be_none_says_nothing(low):
    with pytest.raises(DataError, match="not measurably better than its base"):
        Tolerance(share=0.02).nats(Difference(0.1, low, 0.3, 0.95))
    assert Tolerance(amount=0.01).nats(Difference(0.1, low, 0.3, 0.95)) == 0.01
