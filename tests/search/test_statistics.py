"""Intervals against scipy's where it has them, mean squares against least squares, coverage where truth is known."""

import numpy as np
import pytest
import scipy.stats

from rankwise.errors import DataError
from rankwise.search.statistics import Estimate, Noise, beyond, difference

CHANCE = np.random.default_rng(0)


def layout(seeds, documents, of_seed=1.0, of_both=1.0):
    """Losses of two candidates, and items, all documents alike in length."""
    apart = CHANCE.normal(size=documents) + of_seed * CHANCE.normal(size=(seeds, 1))
    apart = apart + of_both * CHANCE.normal(size=(seeds, documents))
    second = CHANCE.normal(size=(seeds, documents)) + 50
    return second + apart, second, np.full(documents, 4)


def test_one_seed_and_even_documents_are_the_paired_t_test():
    first, second, items = layout(1, 30)
    found = difference(first, second, items)
    want = scipy.stats.ttest_rel(first[0] / items, second[0] / items)
    assert found.p_value() == pytest.approx(want.pvalue)
    assert found.interval() == pytest.approx(tuple(want.confidence_interval()))
    assert found.upper() == pytest.approx(want.confidence_interval(0.9).high)
    assert found.freedom == 29


def test_uneven_documents_weigh_by_their_items():
    first, second, _ = layout(2, 30)
    items = CHANCE.integers(1, 90, size=30)
    found = difference(first, second, items)
    assert found.mean == pytest.approx((first - second).sum() / (2 * items.sum()))
    twice = difference(2 * first, 2 * second, 2 * items)  # a change of unit
    assert (twice.mean, twice.error) == pytest.approx((found.mean, found.error))


@pytest.mark.parametrize("of_seed", [0.5, 2.0])
def test_the_variance_is_that_of_two_crossed_samples(of_seed):
    """Mean squares by least squares on indicator variables."""
    seeds, documents = 4, 12
    first, second, items = layout(seeds, documents, of_seed)
    y = ((first - second) / items).reshape(-1)
    rows, columns = np.repeat(np.eye(seeds), documents, 0), np.tile(np.eye(documents), (seeds, 1))

    def left(*designs):
        design = np.hstack([np.ones((len(y), 1)), *designs])
        return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())

    of_rest = left(rows, columns) / ((seeds - 1) * (documents - 1))
    of_seeds = (left(columns) - left(rows, columns)) / (seeds - 1)
    of_documents = (left(rows) - left(rows, columns)) / (documents - 1)
    whole = max(of_seeds + of_documents - of_rest, of_seeds, of_documents)
    found = difference(first, second, items)
    assert found.error**2 == pytest.approx(whole / (seeds * documents))
    spread = of_seeds**2 / 3 + of_documents**2 / 11 + of_rest**2 / 33
    assert found.freedom == pytest.approx(max(whole**2 / spread, 3))


def test_noise_that_is_known_takes_the_place_of_seeds_that_are_few():
    first, second, items = layout(1, 40)
    alone = difference(first, second, items)
    noise = Noise(variance=0.04, freedom=9)
    found = difference(first, second, items, noise)
    assert found.error**2 == pytest.approx(alone.error**2 + 2 * 0.04)
    assert 9 < found.freedom < 48
    assert found.mean == alone.mean


def test_noise_is_the_variance_of_the_loss_over_seeds_and_can_be_pooled():
    items = np.array([3, 5])
    losses = np.array([[8.0, 16.0], [16.0, 24.0], [0.0, 8.0]])  # 3, 5 and 1 nats per item
    assert Noise.of(losses, items) == Noise(pytest.approx(4.0), 2.0)
    pooled = Noise.pooled([Noise(4.0, 2.0), Noise(1.0, 4.0)])
    assert (pooled.variance, pooled.freedom) == (pytest.approx(2.0), 6.0)


def test_what_can_be_detected_is_found_four_times_in_five():
    found = Estimate(0.0, 0.01, 12.0)
    beyond = scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, 12), 12, found.detectable / found.error)
    assert beyond == pytest.approx(0.8, abs=0.015)


def test_candidates_that_are_one_do_not_differ():
    first, _, items = layout(3, 10)
    found = difference(first, first, items)
    assert (found.mean, found.error, found.p_value()) == (0.0, 0.0, 1.0)
    assert found.interval() == (0.0, 0.0)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("share", [0.0, 2.0])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, share):
    """Of the seed that was drawn where there is only one; of all seeds where there are several."""
    chance, documents, held = np.random.default_rng(1), 60, 0
    for _ in range(2000):
        items = chance.integers(5, 60, size=documents)
        of_seed = chance.normal(size=(seeds, 1)) * share * (seeds > 1) / np.sqrt(documents)
        apart = chance.normal(size=documents) + 0.5 * chance.normal(size=(seeds, documents)) + of_seed + 0.2
        low, high = difference(apart * items, np.zeros_like(apart), items).interval()
        held += low <= 0.2 <= high
    assert 0.93 <= held / 2000 <= 0.97


def test_beyond_a_distribution_is_as_rare_as_it_says_and_beyond_its_mean_is_not():
    """One more draw from where the others come from: an interval about their mean leaves it out far too often."""
    chance, documents, worlds = np.random.default_rng(4), 60, 1000
    mean, spread = 0, 0
    for _ in range(worlds):
        items = chance.integers(5, 60, size=documents)
        arms = 0.5 * chance.normal(size=(5, 1, 1)) + 0.2 * chance.normal(size=(5, 2, documents))
        first, draws = arms[0] * items, arms[1:] * items
        mean += difference(first, draws.mean(0), items).interval()[1] < 0
        spread += beyond(first, draws, items).interval()[1] < 0
    assert mean / worlds > 0.3
    assert 0.01 < spread / worlds < 0.04


def test_beyond_many_draws_that_are_one_is_a_difference_to_it():
    first, second, items = layout(3, 20)
    found, plain = beyond(first, np.stack([second] * 50), items), difference(first, second, items)
    assert (found.mean, found.error) == (pytest.approx(plain.mean), pytest.approx(plain.error))


def test_what_is_not_paired_and_what_is_too_little_is_refused():
    first, second, items = layout(2, 10)
    for one, other, own in ((first, second[:1], items), (first[0], second[0], items), (first, second, items[:9])):
        with pytest.raises(DataError, match="not paired"):
            difference(one, other, own)
    with pytest.raises(DataError, match="at least two documents"):
        difference(first[:, :1], second[:, :1], items[:1])
    with pytest.raises(DataError, match="two draws at least"):
        beyond(first, second[None], items)
    with pytest.raises(DataError, match="two of them"):
        Noise.of(first[:1], items)
