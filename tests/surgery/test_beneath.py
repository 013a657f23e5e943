"""A model that stands on an adapter for a while: what it computes meanwhile, what is made of both, and what is left."""

import pytest
import torch

from rankwise.errors import SpecError
from rankwise.frozen.coded import hold
from rankwise.surgery.bank import Bank
from rankwise.surgery.beneath import Beneath
from tests.grid import moved, relative, spec, state_of, trained
from tests.models import ARCHITECTURES, output, tiny


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "unet"])
@torch.no_grad()
def test_base_and_adapter_then_both_as_one_then_the_base_to_the_bit(name):
    architecture = ARCHITECTURES[name]
    model, inputs = tiny(name), architecture.inputs(2)
    before, bare = state_of(model), output(model, inputs)
    with Bank(model) as bank:
        trained(bank, "lower", spec(architecture.targets))
        with bank.use("lower"):
            lower = output(model, inputs)
        base = bank.base_fingerprint
        beneath = Beneath(bank, "lower")
        assert bank.names == ()
        assert bank.base_fingerprint != base
        assert relative(output(model, inputs), lower) < 1e-5
        trained(bank, "upper", spec(architecture.targets, rank=2, alpha=8, form="adalora"), seed=3)
        with bank.use("upper"):
            both = output(model, inputs)
        made = beneath.joined(bank.adapter("upper"))
        bank.remove("upper")
        beneath.lift()
        assert state_of(model) == before
        assert bank.base_fingerprint == base
        bank.put("joined", made.adapter)
        with bank.use("joined"):
            assert relative(output(model, inputs), both) < 1e-5
        assert relative(both, lower) > 1e-2
        assert {factors.rank for factors in bank.adapter("joined").sites.values()} == {5}
    assert state_of(model) == before
    assert torch.equal(output(model, inputs), bare)


def test_what_is_beneath_is_lifted_when_training_on_top_of_it_fails():
    model = tiny("llama-tied")
    before = state_of(model)
    with Bank(model) as bank:
        trained(bank, "lower", spec(ARCHITECTURES["llama-tied"].targets))
        beneath = Beneath(bank, "lower")
        trained(bank, "upper", spec(("v_proj",)))
        beneath.lift()
        beneath.lift()
    assert state_of(model) == before


def test_what_cannot_be_added_up_is_refused_and_nothing_has_changed():
    model = tiny("llama")
    before = state_of(model)
    with Bank(model) as bank:
        bank.add("magnitudes", spec(("q_proj",), form="dora"))
        with pytest.raises(SpecError, match="of form dora") as caught:
            Beneath(bank, "magnitudes")
        assert "--continue-from" in caught.value.hint
        bank.remove("magnitudes")
        bank.add("whole", spec(("q_proj",), modules_to_save=("lm_head",)))
        moved(bank, "whole")
        with pytest.raises(SpecError, match="modules trained whole"):
            Beneath(bank, "whole")
    assert state_of(model) == before
    coded = hold(tiny("llama"), "nf4")
    with Bank(coded) as bank:
        bank.add("a", spec(("q_proj",)))
        with pytest.raises(SpecError, match="held in nf4"):
            Beneath(bank, "a")
