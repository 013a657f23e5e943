"""Candidates trained side by side: what each becomes does not depend on who else is there, nor on a kill."""

import os
import shutil
import signal

import numpy as np
import pytest

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.evaluate import measured
from rankwise.engine.interrupt import Interrupted
from rankwise.engine.run import Loop, Run
from rankwise.search.pack import Parts
from rankwise.search.study import Candidate, Study
from rankwise.search.trials import Trials
from rankwise.search.truncation import truncated
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus, random_corpus
from tests.models import tiny

DOCUMENTS = Parts(pattern_corpus(24), pattern_corpus(10, seed=1), pattern_corpus(12, seed=2))
LOOP = Loop(batch_documents=4, max_steps=24)
FIELD = {
    "small": Candidate("small", LoraSpec(rank=2, alpha=8, targets="attention"), Run(lr=5e-3)),
    "large": Candidate("large", LoraSpec(rank=8, alpha=8, targets="all-linear", dropout=0.1), Run(lr=2e-2)),
    "dora": Candidate("dora", LoraSpec(rank=4, alpha=8, targets="mlp", form="dora"), Run(lr=5e-3, lr_ratio=4)),
}
WILD = Candidate("wild", LoraSpec(rank=2, targets=("lm_head",)), Run(lr=10.0))


def trials(bank, folder, pack=8, tell=None):
    folder.mkdir(exist_ok=True)
    return Trials(bank, DOCUMENTS, LOOP, Study(folder / "study", {}), folder, pack=pack, tell=tell)


def made(folder, candidates, pack=8, seeds=(0,), share=1.0, tell=None):
    with Bank(tiny("llama")) as bank:
        asked = trials(bank, folder, pack, tell)
        found = asked.made("rate", candidates, seeds, share)
        asked.study.close()
    return found, asked


def test_packed_is_alone_for_every_kind_and_length(tmp_path):
    together, _ = made(tmp_path / "packed", list(FIELD.values()))
    for number, candidate in enumerate(FIELD.values()):
        ((alone,),), _ = made(tmp_path / candidate.name, [candidate])
        (packed,) = together[number]
        np.testing.assert_allclose([loss for _, loss in packed.curve], [loss for _, loss in alone.curve], rtol=1e-5)
        np.testing.assert_allclose(packed.choose, alone.choose, rtol=1e-4)


def test_documents_to_confirm_on_are_looked_at_when_somebody_asks(tmp_path):
    """By then the adapter is the one that was kept; one of another seed is not, and has been judged before it went."""
    candidates = list(FIELD.values())
    with Bank(tiny("llama")) as bank:
        told = []
        asked = trials(bank, tmp_path / "s", pack=2, tell=lambda title, share: told.append(title))
        for row in asked.made("ladder", candidates, [0, 1], 1.0):
            assert [one.confirm is None for one in row] == [True, False]
        told.clear()
        found = asked.confirmed("confirm", candidates, [0, 1])
        assert told
        assert not [title for title in told if " steps, seed " in title], "nothing is trained"
        for candidate, row in zip(candidates, found, strict=True):
            bank.put("own", asked.adapter("ladder", candidate, 0))
            (own,) = measured(bank, ["own"], DOCUMENTS.confirm)[0]
            bank.remove("own")
            np.testing.assert_allclose(row[0].confirm, own, rtol=1e-5)
            assert row[1].confirm.shape == own.shape
        told.clear()
        again = asked.confirmed("confirm", candidates, [0])
        assert not told, "it is known from then on"
        np.testing.assert_array_equal(again[0][0].confirm, found[0][0].confirm)
        assert [step for step, *_ in asked.study.rows()] == ["ladder"] * 6
        asked.study.close()


def test_an_adapter_that_has_gone_is_trained_again_to_be_confirmed(tmp_path):
    candidates = [FIELD["small"], FIELD["large"]]
    with Bank(tiny("llama")) as bank:
        asked = trials(bank, tmp_path / "s")
        asked.made("ladder", candidates, [0], 1.0)
        want = [row[0].confirm for row in asked.confirmed("confirm", candidates, [0])]
        asked.study.close()
        asked = trials(bank, tmp_path / "t")
        asked.made("ladder", candidates, [0], 1.0)
        shutil.rmtree(sorted((tmp_path / "t" / "adapters").iterdir())[-1])
        shutil.rmtree(sorted((tmp_path / "t" / "adapters").iterdir())[0])
        found = [row[0].confirm for row in asked.confirmed("confirm", candidates, [0])]
        asked.study.close()
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_what_is_known_is_not_trained_again_and_costs_are_of_full_runs(tmp_path):
    with Bank(tiny("llama")) as bank:
        told = []
        asked = trials(bank, tmp_path / "s", tell=lambda title, share: told.append(title))
        asked.made("noise", [FIELD["small"]], [0, 1], 0.5)
        assert asked.cost == pytest.approx(1.0)
        told.clear()
        again = asked.made("rate", [FIELD["small"]], [1], 0.5)
        assert not told
        assert again[0][0].confirm is None, "short runs are not for confirming"
        assert asked.cost == pytest.approx(1.0)
        assert bank.names == ()
        asked.study.close()


def test_a_candidate_that_diverges_is_told_and_disturbs_no_other(tmp_path):
    (wild, small), _ = made(tmp_path / "s", [WILD, FIELD["small"]], share=1.0)
    ((alone,),), _ = made(tmp_path / "t", [FIELD["small"]])
    assert small[0].status == "finished"
    np.testing.assert_allclose(small[0].choose, alone.choose, rtol=1e-4)
    assert wild[0].status in ("finished", "diverged", "not finite")
    assert wild[0].choose is None or wild[0].choose.mean() > small[0].choose.mean()


def test_killed_in_a_pack_it_goes_on_and_ends_the_same(tmp_path):
    whole, _ = made(tmp_path / "whole", [FIELD["small"], FIELD["large"]])

    def kill(title, share):
        if share == 0.75:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        made(tmp_path / "killed", [FIELD["small"], FIELD["large"]], tell=kill)
    steps = []
    again, _ = made(
        tmp_path / "killed", [FIELD["small"], FIELD["large"]], tell=lambda title, share: steps.append(share)
    )
    assert steps[1] > 0.5, "the pack went on from its checkpoint"
    for ours, theirs in zip(whole, again, strict=True):
        np.testing.assert_array_equal(ours[0].choose, theirs[0].choose)
        assert ours[0].curve == theirs[0].curve


def test_one_adapter_cut_to_its_own_rank_is_itself_and_to_less_loses(tmp_path):
    with Bank(tiny("llama")) as bank:
        asked = trials(bank, tmp_path / "s")
        ((found,),) = asked.made("ladder", [FIELD["large"]], [0], 1.0)
        adapter = asked.adapter("ladder", FIELD["large"], 0)
        one, most, whole = truncated(bank, adapter, [1, 4, 8], DOCUMENTS.choose, lambda *_: None)
        asked.study.close()
    np.testing.assert_allclose(whole, found.choose, rtol=1e-4)
    assert one.sum() > most.sum() > whole.sum() * 0.99
    assert one.sum() > 1.001 * whole.sum()


def test_documents_of_the_two_judges_differ():
    assert len({DOCUMENTS.choose.digest, DOCUMENTS.confirm.digest, random_corpus([3]).digest}) == 3
