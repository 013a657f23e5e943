"""Which rates are tried, on landscapes that are known: what every trial would give is in the study beforehand."""

import math

import numpy as np
import pytest

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Loop, Run
from rankwise.search.budget import BUDGETS
from rankwise.search.case import Case
from rankwise.search.pack import Parts
from rankwise.search.rate import find_rate
from rankwise.search.study import Found, Study, Trial
from rankwise.search.trials import Trials
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus
from tests.models import tiny

STEPS = 80  # 10, 20 and 80 by rungs
POWERS = range(-8, 13)


@pytest.fixture
def tried(tmp_path):
    """Gives what `find_rate` tries, by length, as powers of two of the rate in the middle, and what it finds."""
    with Bank(tiny("llama")) as bank:
        parts = Parts(*(pattern_corpus(6, seed=seed) for seed in range(3)))
        study = Study(tmp_path / "study", {})
        trials = Trials(bank, parts, Loop(max_steps=STEPS), study, tmp_path, pack=1)
        case = Case(trials, LoraSpec(), Run(lr=1e-3), BUDGETS["standard"], {})
        base = trials.base("choose")

        def find(optimum, fails=(), blurred=()):
            """Losses are parabolas around the `optimum` of each length; of those `blurred`, documents differ widely."""
            for steps in (10, 20, STEPS):
                for power in POWERS:
                    own = base * (0.5 + 0.05 * (power - optimum(steps)) ** 2)
                    apart = np.where(np.arange(len(own)) % 2, 1, -1) * own.mean()
                    own += apart if power in blurred else 1e-3 * apart
                    curve = tuple((step, 3 - step / steps) for step in range(steps))
                    status, losses = ("diverged", None) if power in fails else ("finished", own)
                    trial = Trial(case.candidate(lr=1e-3 * 2.0**power), 0, steps)
                    study.keep(trial, "rate", Found(status, 1.0, curve, losses))
            find_rate(case)
            found = case.record["rate"]
            rates = [[round(math.log2(point["lr"] / 1e-3)) for point in rung["points"]] for rung in found["rungs"]]
            return rates, round(math.log2(found["best"] / 1e-3)), found["interior"]

        yield find
        study.close()


def test_one_that_was_too_high_for_a_short_run_is_not_tried_in_a_long_one(tried):
    rates, best, interior = tried(lambda steps: 0.6)
    assert rates == [[-2, -1, 0, 1, 2, 3], [-1, 0, 1], [0, 1]]
    assert (best, interior) == (1, True)


def test_one_of_which_nobody_can_tell_whether_it_was_too_high_is_tried(tried):
    rates, best, interior = tried(lambda steps: 0.6, blurred=(2,))
    assert rates == [[-2, -1, 0, 1, 2, 3], [0, 1, 2], [0, 1, 2]]
    assert (best, interior) == (1, True)


def test_one_that_was_too_low_for_a_short_run_may_be_right_for_a_long_one(tried):
    rates, best, interior = tried(lambda steps: {10: 1.4, 20: 0.6, 80: -0.9}[steps])
    assert rates[-1] == [-2, -1, 0, 1]
    assert (best, interior) == (-1, True)


def test_a_higher_one_that_no_run_has_tried_is_tried(tried):
    """The ladder ends at 3, below the best of every length."""
    rates, best, interior = tried(lambda steps: 4.2)
    assert rates[0] == [-2, -1, 0, 1, 2, 3, 4, 5]
    assert (best, interior) == (4, True)


def test_one_that_was_worse_for_being_lower_than_the_best_of_a_short_run_is_tried_in_a_long_one(tried):
    """The best of all falls from 3 to 0 with the length; 1 was far too low for the shortest."""
    rates, best, interior = tried(lambda steps: {10: 3.1, 20: 2.1, 80: 0.1}[steps])
    assert 0 in rates[-1]
    assert 1 in rates[-1]
    assert (best, interior) == (0, True)


def test_one_at_which_training_failed_is_too_high(tried):
    rates, best, interior = tried(lambda steps: 1.4, fails=(2, 3, 4, 5))
    assert 2 not in rates[-1]
    assert (best, interior) == (1, True)


def test_after_three_more_at_an_end_it_says_that_it_does_not_know(tried):
    rates, best, interior = tried(lambda steps: 12.0)
    assert [row[-1] for row in rates] == [6, 9, 12]
    assert (best, interior) == (12, False)
