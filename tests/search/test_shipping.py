"""What a search leaves: cut, checked against training at the very ranks that are left, and the better of the two."""

import numpy as np
import pytest

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Loop, Run
from rankwise.formats.peft import read_adapter
from rankwise.search.advisor import Advisor
from rankwise.search.budget import BUDGETS
from rankwise.search.pack import Parts
from rankwise.search.statistics import Noise
from rankwise.search.study import Study
from rankwise.search.trials import Trials
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus
from tests.models import tiny

DOCUMENTS = Parts(pattern_corpus(40), pattern_corpus(60, seed=1), pattern_corpus(24, seed=2))


def shipped(folder, budget="standard", noise=1e-6, **own):
    with Bank(tiny("llama")) as bank:
        trials = Trials(bank, DOCUMENTS, Loop(batch_documents=8, max_steps=40), Study(folder / "s", {}), folder, pack=8)
        spec = LoraSpec(**{"rank": 8, "alpha": 8, "targets": "all-linear", **own})
        advisor = Advisor(trials, spec, Run(lr=2e-2), BUDGETS[budget], {"all-linear": 1})
        advisor.noise = Noise(noise, 4)
        advisor.ship(folder / "adapter", {})
        rows = trials.study.rows()
        trials.study.close()
    return advisor.record["ship"], read_adapter(folder / "adapter"), rows


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    return shipped(tmp_path_factory.mktemp("ship"))


def test_what_is_left_is_checked_against_training_at_its_very_ranks(checked):
    told, adapter, rows = checked
    kept = {path: rank for path, rank in told["ranks"].items() if rank}
    assert sum(kept.values()) < 8 * len(told["ranks"]), "something was taken out"
    assert {path: factors.rank for path, factors in adapter.sites.items()} == kept
    (row,) = [row for row in rows if row[0] == "ship"]
    assert row[1].startswith("trained at the ranks left")
    assert (row[2], row[3]) == (0, 40), "full length, the search's own seed"
    control, items = told["control"], DOCUMENTS.confirm.supervised_counts().sum()
    assert control["loss"] == pytest.approx(row[4].confirm.sum() / items)
    assert control["delta"]["mean"] == pytest.approx(control["loss"] - told["losses"]["compressed"])
    assert control["kept"] == ("trained" if control["delta"]["high"] < 0 else "compressed")
    assert told["no_control"] == ""


def test_the_one_that_is_kept_is_the_one_in_the_folder(checked):
    """Training begins with alpha over the rank; what was cut has scale 1."""
    told, adapter, _ = checked
    scales = {factors.scale for factors in adapter.sites.values()}
    assert (scales == {1.0}) == (told["control"]["kept"] == "compressed")


def test_where_seeds_move_more_than_the_difference_the_cut_one_stays(tmp_path):
    told, adapter, _ = shipped(tmp_path, noise=1e4)
    assert told["control"]["kept"] == "compressed"
    assert {factors.scale for factors in adapter.sites.values()} == {1.0}


@pytest.mark.parametrize(
    ("own", "why"),
    [({"budget": "express"}, "its budget does not pay"), ({"form": "dora"}, "nothing was taken out")],
)
def test_why_nothing_is_trained_again_is_said(tmp_path, own, why):
    told, _, rows = shipped(tmp_path, **own)
    assert told["control"] is None
    assert told["no_control"].startswith(why)
    assert [row for row in rows if row[0] == "ship"] == []
    assert np.isfinite(told["losses"]["compressed"])
