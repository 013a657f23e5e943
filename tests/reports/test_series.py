import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.reports.run import Curve, Step
from rankwise.reports.series import Series, finite, smooth, thin, training_losses

values = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=400)


def series(ys) -> Series:
    return Series(tuple(range(len(ys))), tuple(ys))


@given(values, st.integers(4, 60))
def test_thinning_keeps_the_extremes_and_the_order(ys, most):
    drawn = thin(series(ys), most)
    assert len(drawn.xs) <= max(most, len(ys) if len(ys) <= most else 0)
    assert (min(drawn.ys), max(drawn.ys)) == (min(ys), max(ys))
    assert list(drawn.xs) == sorted(drawn.xs)
    assert all(ys[int(x)] == y for x, y in zip(drawn.xs, drawn.ys, strict=True))


@given(values)
def test_a_smoothed_curve_stays_between_the_extremes(ys):
    smoothed = smooth(series(ys), [1.0] * len(ys))
    assert len(smoothed.ys) == len(ys)
    assert min(ys) - 1e-6 <= min(smoothed.ys)
    assert max(smoothed.ys) <= max(ys) + 1e-6


def test_smoothing_does_not_lag():
    peak = [0.0] * 50 + [1.0] + [0.0] * 50
    smoothed = smooth(series(peak), [1.0] * 101).ys
    assert smoothed[50] == pytest.approx(1 / 7)
    assert smoothed[47] == pytest.approx(smoothed[53])
    assert smoothed[46] == smoothed[54] == 0


def test_a_step_with_more_supervised_tokens_weighs_more():
    curve = Curve(tuple(Step(i, "a", weight, loss) for i, (weight, loss) in enumerate([(30, 1.0), (10, 5.0)] * 20)), ())
    _, smoothed = training_losses(curve)
    assert smoothed.ys[20] == pytest.approx((10 * 5.0 + 30 * 1.0 + 10 * 5.0) / 50)


def test_a_step_without_mass_speaks_for_itself():
    assert smooth(series([2.0]), [0]).ys == (2.0,)


def test_what_cannot_be_drawn_is_left_out():
    assert finite([1, 2, 3, 4], [1.0, None, math.nan, math.inf]) == Series((1,), (1.0,))
