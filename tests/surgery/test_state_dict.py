"""What other tools save of a model that holds adapters, and load into it: the base keeps its own names."""

import copy

import pytest
import torch
import transformers as hf

from rankwise.surgery.bank import Bank
from tests.grid import spec, state_of, trained
from tests.models import ARCHITECTURES, output, tiny, words

WHOLE = {"roberta": ("classifier",), "llama-tied": ("model.norm",)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_base_keeps_its_names_its_order_and_its_bytes(name):
    model = tiny(name)
    want = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with Bank(model) as bank:
        for number, own in enumerate(("a", "b.2")):
            chosen = spec(ARCHITECTURES[name].targets, modules_to_save=WHOLE.get(name, ()))
            trained(bank, own, chosen, seed=number)
        held = model.state_dict()
        ours = {key for own in bank.names for key, _ in bank.named_parameters(own)}
    assert [key for key in held if key in want] == list(want)
    assert all(torch.equal(held[key], tensor) for key, tensor in want.items())
    assert len(held) - len(want) >= 2 * len(ours)  # aliases come on top
    assert all(".adapters." in key for key in held.keys() - want.keys())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "roberta", "unet", "t5"])
def test_what_is_taken_out_goes_in_again_adapters_and_all(name):
    model, other = tiny(name), tiny(name)
    chosen = spec(ARCHITECTURES[name].targets, form="dora", modules_to_save=WHOLE.get(name, ()))
    with Bank(model) as bank, Bank(other) as second:
        trained(bank, "a", chosen, seed=1)
        trained(second, "a", chosen, seed=2)
        with torch.no_grad():
            next(iter(other.parameters())).mul_(2)
        assert second.adapter("a").digest() != bank.adapter("a").digest()
        other.load_state_dict(model.state_dict())
        assert second.adapter("a").digest() == bank.adapter("a").digest()
    assert state_of(other)[0] == state_of(model)[0]


def test_a_checkpoint_of_the_base_alone_still_fits():
    model, base = tiny("llama"), tiny("llama").state_dict()
    with Bank(model) as bank:
        trained(bank, "a", spec("all-linear"))
        digest = bank.adapter("a").digest()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.zero_()
        found = model.load_state_dict(base, strict=False)
        assert bank.adapter("a").digest() == digest
        assert not found.unexpected_keys
        assert len(found.missing_keys) == 2 * len(bank.adapter("a").sites)
        strange = model.load_state_dict(base | {"model.layers.0.mlp.up_proj.wait": torch.ones(1)}, strict=False)
        assert strange.unexpected_keys == ["model.layers.0.mlp.up_proj.wait"]
    assert state_of(model)[0] == state_of(tiny("llama"))[0]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "roberta", "t5"])
@torch.no_grad()
def test_save_pretrained_writes_a_base_that_loads_as_the_base(name, tmp_path):
    model, inputs = tiny(name), ARCHITECTURES[name].inputs(2)
    with Bank(model) as bank:
        trained(bank, "a", spec(ARCHITECTURES[name].targets, modules_to_save=WHOLE.get(name, ())))
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert state_of(again)[0] == state_of(model)[0]
    assert torch.equal(output(again, inputs), output(model, inputs))


@torch.no_grad()
def test_a_copied_bank_holds_a_copied_model():
    model, inputs = tiny("llama"), words(2)
    with Bank(model) as bank:
        trained(bank, "a", spec("all-linear", modules_to_save=("norm",)))
        with bank.use("a"):
            want, twin = output(model, inputs), copy.deepcopy(bank)
        bare = output(model, inputs)
        assert twin.model is not model
        with twin.use("a"):
            assert torch.equal(output(twin.model, inputs), want)
            assert torch.equal(output(model, inputs), bare)
        for _, parameter in twin.named_parameters("a"):
            parameter.zero_()
        twin.close()
        assert torch.equal(output(twin.model, inputs), bare)
        with bank.use("a"):
            assert torch.equal(output(model, inputs), want)


@pytest.mark.parametrize("within", [True, False])
@torch.no_grad()
def test_a_copied_model_is_the_bare_base_wherever_it_was_copied(within):
    model, inputs = tiny("llama"), words(2)
    with Bank(model) as bank:
        trained(bank, "a", spec("all-linear"))
        with bank.use("a" if within else None):
            twin = copy.deepcopy(model)
        with bank.use("a"):
            assert torch.equal(output(twin, inputs), output(tiny("llama"), inputs))


def test_a_model_that_was_saved_can_be_held_again(tmp_path):
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec("all-linear"))
        bank.save("a", tmp_path / "a")
        bank.model.save_pretrained(tmp_path / "base")
        with bank.use("a"):
            want = output(bank.model, words(2))
    with Bank(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()) as bank:
        bank.load("a", tmp_path / "a")
        with bank.use("a"):
            assert torch.equal(output(bank.model, words(2)), want)
