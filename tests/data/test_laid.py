"""Hidden tokens: as many as BERT hides, others at every step, in evaluation always the same."""

import numpy as np
import pytest

from rankwise.data.laid import Labelled, Masked
from tests.corpora import random_examples, random_labelled, random_masked, random_pairs
from tests.models import VOCAB

TASKS = ("masked-lm", "seq2seq", "sequence-classification", "image-classification")


@pytest.mark.parametrize("length", [3, 9, 20, 100, 513])
def test_fifteen_in_a_hundred_are_hidden_at_least_one_and_always_as_many(length):
    examples = random_masked([length])
    counts = {len(examples.drawn(step).document(0)[1]) for step in range(20)}
    assert counts == {max(1, round(0.15 * (length - 2)))} == set(examples.supervised_counts().tolist())


def test_what_is_wanted_is_what_stood_there_and_nothing_else_is_changed():
    examples = random_masked([60])
    for step in range(10):
        shown, hidden, wanted = examples.drawn(step).document(0)
        original = examples.laid.document(0)[0]
        assert np.array_equal(original[hidden], wanted)
        rest = np.setdiff1d(np.arange(60), hidden)
        assert np.array_equal(shown[rest], original[rest])


def test_eighty_ten_ten():
    """Over 20 000 hidden tokens the shares are within four standard errors of BERT's (§3.1)."""
    examples = random_masked([1002] * 20)
    masked = same = count = 0
    for step in range(7):
        for i in range(20):
            shown, hidden, wanted = examples.drawn(step).document(i)
            masked += int((shown[hidden] == examples.mask_token).sum())
            same += int((shown[hidden] == wanted).sum())
            count += len(hidden)
    by_chance = 0.1 / VOCAB  # another token is drawn from all, so it may be the mask or the very same
    expected = {"masked": 0.8 + by_chance, "same": 0.1 + by_chance + 0.8 / (VOCAB - 3)}
    for name, found in (("masked", masked / count), ("same", same / count)):
        share = expected[name]
        assert abs(found - share) < 4 * (share * (1 - share) / count) ** 0.5, name


def test_every_step_hides_others_and_evaluation_always_the_same():
    examples = random_masked([40, 40])
    assert np.array_equal(examples.document(1)[1], random_masked([40, 40]).document(1)[1])
    draws = [tuple(examples.drawn(step).document(1)[1]) for step in range(10)]
    assert len({*draws, tuple(examples.document(1)[1])}) == 11
    assert np.array_equal(examples.drawn(3).document(1)[0], examples.drawn(3).document(1)[0])
    assert examples.drawn(5).digest == examples.digest
    assert Masked(examples.laid, 5, VOCAB, seed=1).digest != examples.digest


@pytest.mark.parametrize("task", TASKS)
def test_a_part_is_the_same_documents(task):
    examples = random_examples(task)
    part = examples.subset([4, 1])
    assert len(part) == 2
    assert part.lengths().tolist() == examples.lengths()[[4, 1]].tolist()
    assert part.supervised_counts().tolist() == examples.supervised_counts()[[4, 1]].tolist()
    assert [part.content(0), part.content(1)] == [examples.content(4), examples.content(1)]
    assert [part.origin(0), part.origin(1)] == [examples.origin(4), examples.origin(1)]
    assert part.digest != examples.digest
    assert examples.subset(range(6)).digest == examples.digest


def test_a_digest_is_of_all_that_is_learnt():
    labelled = random_labelled([9, 4])
    other = random_labelled([9, 4])
    other.laid.tokens[other.laid.bounds[1] - 1] = (labelled.labels[0] + 1) % 3
    assert labelled.digest == random_labelled([9, 4]).digest != other.digest
    assert labelled.content(0) == other.content(0)
    pairs = random_pairs([(3, 4)])
    assert pairs.digest != Labelled(pairs.laid, ()).digest, "the same tokens, and another meaning"
