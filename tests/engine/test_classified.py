"""Accuracy, its interval, F1 and McNemar's test, against their definitions written out and published values."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.engine.classified import Classified, accuracy_difference, confusion, macro_f1, mcnemar, scores, wilson

SAID = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(SAID)
def test_macro_f1_is_the_mean_of_each_classs_own(pairs):
    labels, predicted = np.array(pairs).T
    each = []
    for one in sorted({*labels.tolist(), *predicted.tolist()}):
        right = sum(a == b == one for a, b in pairs)
        precision = right / max(1, sum(b == one for _, b in pairs))
        recall = right / max(1, sum(a == one for a, _ in pairs))
        each.append(2 * precision * recall / (precision + recall) if right else 0.0)
    counts = confusion(predicted, labels, 4)
    assert macro_f1(counts) == pytest.approx(np.mean(each))
    assert counts.sum() == len(pairs)
    assert counts[labels[0], predicted[0]] >= 1


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_as_newcombe_gives_it(right, of, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson(right, of) == pytest.approx((low, high), abs=1e-4)
    assert wilson(of - right, of) == pytest.approx((1 - high, 1 - low), abs=1e-4)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_the_binomial_test(first, second):
    count, fewer = first + second, min(first, second)
    want = min(1.0, 2 * sum(comb(count, k) for k in range(fewer + 1)) / 2**count)
    assert mcnemar(first, second) == pytest.approx(want, rel=1e-9)


def test_many_documents_are_no_trouble():
    assert mcnemar(50_000, 50_000) == pytest.approx(1.0, abs=0.01)
    assert mcnemar(40_000, 60_000) < 1e-100


def test_a_difference_is_that_of_the_accuracies_and_its_interval_holds_it():
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=400)
    good = np.where(generator.random(400) < 0.9, labels, (labels + 1) % 3)
    poor = np.where(generator.random(400) < 0.7, labels, (labels + 1) % 3)
    found = accuracy_difference(good, poor, labels)
    assert found["mean"] == pytest.approx(float((good == labels).mean() - (poor == labels).mean()))
    assert 0 < found["low"] < found["mean"] < found["high"]
    assert found["mcnemar_p"] < 1e-6
    assert accuracy_difference(good, good, labels) == {"mean": 0.0, "low": 0.0, "high": 0.0, "mcnemar_p": 1.0}


def test_what_is_said_of_a_base_and_of_adapters():
    labels = np.array([0, 0, 1, 2])
    said = Classified(("a", "b", "c"), labels, np.zeros(4, dtype=int), np.array([[0, 0, 1, 1], [2, 2, 2, 2]]))
    assert said.of_base() == scores(np.zeros(4, dtype=int), labels, 3)
    assert said.of_base()["accuracy"]["value"] == 0.5
    assert said.of_adapter(0)["accuracy"]["value"] == 0.75
    assert said.of_adapter(1)["accuracy_delta"]["mean"] == -0.25
