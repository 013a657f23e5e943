"""What seeds do to a training of full length is told by such trainings alone, where there are some."""

import numpy as np
import pytest

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Loop, Run
from rankwise.search.budget import BUDGETS
from rankwise.search.case import Case
from rankwise.search.pack import Parts
from rankwise.search.statistics import Noise
from rankwise.search.study import Study
from rankwise.search.trials import Trials
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus
from tests.models import tiny

SHORT = Noise(1e-8, 2.0)  # of runs that had hardly begun to learn


@pytest.fixture
def case(tmp_path):
    parts = Parts(*(pattern_corpus(6, seed=seed) for seed in range(3)))
    with Bank(tiny("llama")) as bank:
        study = Study(tmp_path / "study", {})
        trials = Trials(bank, parts, Loop(max_steps=4), study, tmp_path, pack=1)
        yield Case(trials, LoraSpec(), Run(), BUDGETS["standard"], {}, noise=SHORT)
        study.close()


def test_seeds_of_full_length_speak_alone(case):
    items = case.trials.items("choose")
    losses = [np.outer([1.0, 1.2, 0.9], items), np.outer([2.0, 2.2, 2.1], items)]
    found = case.noise_with(losses, "choose")
    assert found.freedom == 4
    assert found.variance == pytest.approx((np.var([1.0, 1.2, 0.9], ddof=1) + np.var([2.0, 2.2, 2.1], ddof=1)) / 2)


def test_without_several_seeds_the_short_runs_are_all_there_is(case):
    losses = [np.outer([1.0], case.trials.items("choose"))]
    assert case.noise_with(losses, "choose") is SHORT
