"""What is left of an adapter: that it is as good as is said, that it is a part, and that nothing else has changed."""

from typing import get_args

import numpy as np
import peft
import pytest
import torch

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.lowrank import LowRank
from rankwise.data.split import split
from rankwise.engine.evaluate import evaluate
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Pruning, Run
from rankwise.errors import BankError, DataError, SpecError
from rankwise.search.compression import compress
from rankwise.search.tolerance import Tolerance
from rankwise.search.worth import Worth
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus, random_corpus, random_labelled
from tests.engine.test_gradient import mean_loss
from tests.grid import spec, state_of, trained
from tests.models import tiny

WORTHS = get_args(Worth)
UNSEEN = pattern_corpus(40, seed=1)
GENEROUS = Tolerance(share=0.3)


def learnt(bank, chosen=None, run=None):
    """An adapter `a` that has learnt the pattern."""
    bank.add("a", chosen or spec(rank=6))
    train(bank, {"a": run or Run(lr=1e-2)}, pattern_corpus(40), loop=Loop(batch_documents=8, max_steps=25))


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    with Bank(tiny("llama")) as bank:
        learnt(bank)
        return bank.adapter("a")


def loss_of(bank, name, corpus):
    with torch.no_grad(), bank.use(name):
        return float(mean_loss(bank.model, corpus))


@pytest.mark.parametrize("worth", WORTHS)
def test_what_is_left_is_within_the_tolerance_as_transformers_own_pass_says(adapter, worth):
    with Bank(tiny("llama")) as bank:
        bank.put("a", adapter)
        found = compress(bank, "a", UNSEEN, worth=worth, tolerance=GENEROUS)
        bank.put("small", found.adapter)
        first, second = split(UNSEEN, 0.5, 0)
        base, whole, small = (loss_of(bank, name, second) for name in (None, "a", "small"))
        gain = loss_of(bank, None, first) - loss_of(bank, "a", first)
    assert found.losses == pytest.approx({"base": base, "whole": whole, "compressed": small}, rel=1e-4)
    assert found.chosen.difference.mean == pytest.approx(small - whole, abs=1e-4)
    assert found.tolerance == pytest.approx(0.3 * gain, rel=1e-4)
    assert found.chosen.difference.high <= found.tolerance
    assert found.chosen.parameters == found.adapter.parameter_count() < 0.9 * adapter.parameter_count()


def test_the_first_half_chooses_and_the_second_tests_from_the_largest_down(adapter):
    with Bank(tiny("llama")) as bank:
        bank.put("a", adapter)
        found = compress(bank, "a", UNSEEN, tolerance=GENEROUS)
    chosen = min(point.parts for point in found.first if point.within)
    tested = [point.parts for point in found.second]
    assert tested == sorted(tested, reverse=True)
    assert tested[-1] >= chosen
    assert all(point.within for point in found.second[:-1]), "a size was believed after a larger one had failed"
    assert found.documents == (20, 20)
    assert found.parts == sum(factors.rank for factors in adapter.sites.values())


@pytest.mark.parametrize("worth", WORTHS)
@pytest.mark.parametrize("idle", ["A", "B"])
def test_parts_that_do_nothing_go_first_and_cost_nothing(adapter, worth, idle):
    """The adapter of rank 6 at rank 12, where rows of A, or columns of B, that are zero stand beside noise."""

    def widened(own):
        A, B = own.A.detach(), own.B.detach()
        more_A, more_B = (
            torch.zeros_like(x) if name == idle else torch.randn_like(x) for name, x in (("A", A), ("B", B))
        )
        return LowRank(torch.cat([A, more_A]), torch.cat([B, more_B], dim=1), own.scale)

    sites = {path: widened(own) for path, own in adapter.sites.items()}
    with Bank(tiny("llama")) as bank:
        bank.put("a", Adapter(adapter.spec, sites))
        found = compress(bank, "a", UNSEEN, worth=worth, tolerance=Tolerance(amount=1e-3))
    assert found.parameters == 2 * adapter.parameter_count()
    assert found.chosen.parameters <= 1.15 * adapter.parameter_count()


def test_a_site_that_no_loss_depends_on_goes_before_all_others(adapter):
    path = next(path for path in adapter.sites if path.endswith("q_proj"))
    with Bank(tiny("llama")) as bank:
        with torch.no_grad():
            bank.model.get_submodule(path.replace("q_proj", "o_proj")).weight.zero_()
        bank.put("a", adapter)
        found = compress(bank, "a", UNSEEN, tolerance=GENEROUS)
    assert path not in found.ranks


@pytest.mark.parametrize("form", ["adalora", "pissa", "rslora"])
def test_whatever_the_form_or_start_the_parts_are_plain(form, tmp_path):
    told = {"adalora": {"form": "adalora"}, "pissa": {"init": "pissa"}, "rslora": {"scaling": "alpha/sqrt(r)"}}[form]
    with Bank(tiny("llama")) as bank:
        learnt(bank, spec(rank=4, **told), Run(lr=1e-2, pruning=Pruning(target_rank=2, every=1)))
        found = compress(bank, "a", UNSEEN, tolerance=GENEROUS)
        bank.put("small", found.adapter)
        bank.save("small", tmp_path)
        want = loss_of(bank, "small", UNSEEN)
    model = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    with torch.no_grad():
        assert float(mean_loss(model, UNSEEN)) == pytest.approx(want, rel=1e-5)
    assert found.ranks == {path: own.rank for path, own in found.adapter.sites.items()}
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert {config.r, *config.rank_pattern.values()} == set(found.ranks.values())


def test_the_bank_keeps_the_adapter_and_the_base_as_they_were(adapter):
    with Bank(tiny("llama")) as bank:
        bank.put("a", adapter)
        bank.put("parts-0", adapter)  # the name that would be taken
        before, digest = state_of(bank.model), bank.adapter("a").digest()
        compress(bank, "a", UNSEEN, tolerance=GENEROUS)
        assert bank.names == ("a", "parts-0")
        assert bank.adapter("a").digest() == digest
        assert state_of(bank.model) == before


def test_with_the_same_seed_it_is_the_same_and_with_another_the_halves_are_others(adapter):
    with Bank(tiny("llama")) as bank:
        bank.put("a", adapter)
        one, same, other = (compress(bank, "a", UNSEEN, tolerance=GENEROUS, seed=seed) for seed in (0, 0, 1))
    assert one.adapter.digest() == same.adapter.digest()
    assert one.record() == same.record()
    assert one.losses["base"] != other.losses["base"]


def test_what_it_says_can_be_written_as_json_and_the_evaluation_is_paired(adapter):
    with Bank(tiny("llama")) as bank:
        bank.put("a", adapter)
        found = compress(bank, "a", UNSEEN, tolerance=GENEROUS)
        bank.put("small", found.adapter)
        _, second = split(UNSEEN, 0.5, 0)
        want = evaluate(bank, ["small", "a"], second)
    assert found.evaluation.names == ("compressed", "whole")
    np.testing.assert_allclose(found.evaluation.losses, want.losses, rtol=1e-4)
    np.testing.assert_allclose(found.evaluation.base, want.base, rtol=1e-6)


def test_classes_and_a_head_that_was_trained_whole_stay():
    examples = random_labelled([7, 9, 5, 12, 3, 20] * 6)
    chosen = spec(rank=4, targets=("query", "dense"), modules_to_save=("classifier",))
    with Bank(tiny("bert", task="sequence-classification")) as bank:
        bank.add("a", chosen)
        train(bank, {"a": Run(lr=1e-2)}, examples, loop=Loop(batch_documents=12, max_steps=30))
        found = compress(bank, "a", examples, tolerance=GENEROUS, frequencies=(1, 1, 1))
    assert found.evaluation.reference == "class frequencies"
    assert found.evaluation.classified is not None
    assert found.adapter.modules.keys() == {"classifier"}
    assert found.chosen.parameters < found.parameters


# ── what it refuses ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_recommended_that_the_documents_do_not_show(adapter):
    with Bank(tiny("llama")) as bank:
        bank.put("a", adapter)
        with pytest.raises(DataError, match=r"nothing is shown to be dispensable: with \d+% .* on 20 documents"):
            compress(bank, "a", UNSEEN, worth="plain", tolerance=Tolerance(amount=1e-12))
        assert bank.names == ("a",)


def test_an_adapter_that_gains_nothing_has_no_share_of_it():
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(), size=0.01)
        with pytest.raises(DataError, match="not measurably better than its base"):
            compress(bank, "a", random_corpus([9] * 12))


def test_few_documents_dora_no_sites_and_no_adapter_are_refused():
    with Bank(tiny("llama")) as bank:
        bank.add("d", spec(form="dora"))
        bank.add("a", spec())
        with pytest.raises(SpecError, match="form dora"):
            compress(bank, "d", UNSEEN)
        with pytest.raises(DataError, match="3 documents"):
            compress(bank, "a", UNSEEN.subset(range(3)))
        with pytest.raises(BankError):
            compress(bank, "b", UNSEEN)
