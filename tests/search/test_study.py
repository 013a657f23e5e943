"""Trials that are remembered."""

import numpy as np
import pytest

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Run
from rankwise.errors import RunFolderError
from rankwise.search.study import Candidate, Found, Study, Trial

IDENTITY = {"base": "abc", "documents": ["x", "y"]}


def trial(seed=0, steps=4, lr=1e-3, rank=4):
    return Trial(Candidate(f"r {rank}", LoraSpec(rank=rank), Run(lr=lr)), seed, steps)


def test_what_is_kept_is_found_again_by_another_process(tmp_path):
    found = Found("finished", 1.5, ((1, 2.5), (2, 2.25)), np.array([1.0, 2.0]), np.array([3.0]))
    failed = Found("diverged", 0.5, ((1, 9.0),))
    first = Study(tmp_path / "s", IDENTITY)
    first.keep(trial(), "rate", found)
    first.keep(trial(lr=1.0), "rate", failed)
    first.close()
    again = Study(tmp_path / "s", IDENTITY)
    known, other = again.find(trial()), again.find(trial(lr=1.0))
    assert (known.status, known.seconds, known.curve) == (found.status, found.seconds, found.curve)
    np.testing.assert_array_equal(known.choose, found.choose)
    np.testing.assert_array_equal(known.confirm, found.confirm)
    assert other.choose is None
    assert [row[:4] for row in again.rows()] == [("rate", "r 4", 0, 4)] * 2
    again.close()


@pytest.mark.parametrize("other", [{"seed": 1}, {"steps": 5}, {"lr": 2e-3}, {"rank": 8}], ids=str)
def test_another_trial_is_not_taken_for_it(tmp_path, other):
    study = Study(tmp_path / "s", IDENTITY)
    study.keep(trial(), "rate", Found("finished", 1.0, ()))
    assert study.find(trial(**other)) is None
    study.close()


def test_the_name_of_a_candidate_is_for_people_alone():
    same = Trial(Candidate("another name", LoraSpec(rank=4), Run(lr=1e-3)), 0, 4)
    assert same.key == trial().key


def test_a_study_of_another_search_is_refused_and_says_what_differs(tmp_path):
    Study(tmp_path / "s", IDENTITY).close()
    with pytest.raises(RunFolderError, match="of another search: documents differ"):
        Study(tmp_path / "s", IDENTITY | {"documents": ["z"]})


def test_a_file_that_is_no_study_is_refused(tmp_path):
    (tmp_path / "s").write_bytes(b"not a database, and long enough to be looked at" * 50)
    with pytest.raises(RunFolderError, match="not a study that can be read"):
        Study(tmp_path / "s", IDENTITY)
