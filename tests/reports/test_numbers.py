import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.reports import numbers


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.decimal(-0.4123), "−0.412"),
        (numbers.decimal(-0.0001), "0.000"),
        (numbers.signed(0.5), "+0.500"),
        (numbers.signed(-0.5), "−0.500"),
        (numbers.signed(0.0), "0.000"),
        (numbers.perplexity(2.51), "12.3"),
        (numbers.perplexity(2.09), "8.1"),
        (numbers.perplexity(0.1), "1.11"),
        (numbers.perplexity(8.0), "2,981"),
        (numbers.perplexity(1e9), "over a million"),
        (numbers.short_count(4_884_480), "4.88 M"),
        (numbers.short_count(512), "512"),
        (numbers.counted(1, "document"), "1 document"),
        (numbers.counted(2140, "document"), "2,140 documents"),
        (numbers.size(1_214_000_000), "1.21 GB"),
        (numbers.size(640), "640 B"),
        (numbers.duration(4.26), "4.3 s"),
        (numbers.duration(161.4), "2 min 41 s"),
        (numbers.duration(3599.9), "1 h 00 min"),
        (numbers.plain(2e-4), "2e-4"),
        (numbers.plain(32.0), "32"),
        (numbers.ranges([3, 1, 2, 7, 9, 10]), "1–3, 7, 9–10"),
        (numbers.unbroken("95 % of 1 … 2 → 3"), "95\u00a0% of 1\u00a0…\u00a02\u00a0→\u00a03"),
    ],
)
def test_numbers_are_written_as_people_read_them(written, expected):
    assert written == expected


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [(0, 9, "0 %"), (9, 9, "100 %"), (213, 214, "over 99 %"), (1, 214, "under 1 %"), (199, 214, "93 %")],
)
def test_all_and_none_are_said_only_when_exact(part, whole, expected):
    assert numbers.percent(part, whole) == expected


@pytest.mark.parametrize(("half", "places"), [(0.042, 3), (0.4, 3), (0.0042, 4), (1e-9, 6), (0.0, 3), (math.nan, 3)])
def test_decimals_show_two_digits_of_the_uncertainty(half, places):
    assert numbers.decimals_for(half) == places


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_say_every_number_and_no_other(chosen):
    said = set()
    for piece in numbers.ranges(chosen).split(", "):
        first, _, last = piece.partition("–")
        said |= set(range(int(first), int(last or first) + 1))
    assert said == chosen


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "none"),
        (True, "yes"),
        (4096, "4096"),
        (0.05, "0.05"),
        (["q_proj", "v_proj"], "q_proj, v_proj"),
        ({}, "none"),
        ({"lr": 1e-5}, "lr: 1e-5"),
    ],
)
def test_any_setting_fits_a_cell(value, expected):
    assert numbers.anything(value) == expected
