import math

import numpy as np
import pytest

from rankwise.engine.paired import paired_difference
from rankwise.errors import DataError


def sample(documents: int, effect: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 50, size=documents)
    base = tokens * generator.gamma(4, 0.5, size=documents)  # documents differ far more than models do
    return base + tokens * (effect + 0.2 * generator.standard_normal(documents)), base, tokens


def test_the_mean_is_per_token_not_per_document():
    first, second = np.array([10.0, 1.0]), np.array([20.0, 2.0])
    assert paired_difference(first, second, np.array([10, 1])).mean == pytest.approx(-1.0)


def test_pairing_sees_what_separate_means_cannot():
    first, second, tokens = sample(300, -0.1, 1)
    found = paired_difference(first, second, tokens)
    assert found.low < -0.1 < found.high < 0
    assert found.high - found.low < 0.1
    assert (second / tokens).std() / math.sqrt(300) > 0.05


def test_ninety_five_percent_intervals_cover_about_ninety_five_percent():
    truth = -0.05
    covered = 0
    for seed in range(200):
        first, second, tokens = sample(150, truth, seed)
        found = paired_difference(first, second, tokens)
        covered += found.low <= truth <= found.high
    assert 180 <= covered <= 200


def test_equal_models_differ_by_nothing():
    _, second, tokens = sample(50, 0, 3)
    found = paired_difference(second, second, tokens)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_one_document_has_no_interval():
    with pytest.raises(DataError, match="at least two"):
        paired_difference(np.ones(1), np.ones(1), np.ones(1))


def test_the_same_numbers_give_the_same_interval():
    first, second, tokens = sample(80, 0.1, 5)
    assert paired_difference(first, second, tokens) == paired_difference(first, second, tokens)
