"""What others read of a layer that stands in another's place, or set in it, instead of calling it."""

import pytest
import torch

from rankwise.errors import RankwiseWarning
from rankwise.surgery.bank import Bank
from tests.grid import spec, trained
from tests.models import output, tiny, words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_of_a_module_trained_whole_is_that_of_the_adapter_in_force(dtype):
    """Some losses multiply with the head's weight and never call it (TRL's, Liger's)."""
    model, x = tiny("llama", dtype), torch.randn(5, 32).to(dtype)
    with Bank(model) as bank:
        trained(bank, "a", spec("minimal", modules_to_save=("lm_head",)), seed=1)
        trained(bank, "b", spec("minimal"), seed=2)
        head, frozen = model.get_output_embeddings(), bank.modules["lm_head"].weight
        for route in (bank.use("b"), bank.use(None), bank.route(["a", None])):
            with route:
                assert head.weight is frozen
        assert head.weight is frozen
        (own,) = (p for path, p in bank.named_parameters("a") if path == "lm_head.weight")
        with bank.use("a"):
            weight, bias = head.weight, head.bias
            assert bias is None
            assert torch.equal(x @ weight.t(), head(x))
            (x @ weight.t()).sum().backward()
            got, own.grad = own.grad, None
            head(x).sum().backward()
        assert got.any()
        assert torch.equal(own.grad, got)
        bank.merge("a")
        assert torch.equal(x @ head.weight.t(), head(x))


def test_dropout_that_is_switched_off_wherever_it_is_found_is_off_here_too():
    model, inputs = tiny("llama"), words(2)
    with Bank(model) as bank, torch.no_grad():
        trained(bank, "a", spec("minimal", dropout=0.5))
        with bank.use("a"):
            calm = output(model, inputs)
            model.train()
            assert not torch.equal(output(model, inputs), calm)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            assert torch.equal(output(model, inputs), calm)
        assert bank.adapter("a").spec.dropout == 0.5


def test_sites_that_training_never_reached_are_named_when_the_adapter_is_saved(tmp_path, recwarn):
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec("attention"))
        bank.save("a", tmp_path / "fresh")
        assert not recwarn.list
        with torch.no_grad():
            for path, parameter in bank.named_parameters("a"):
                if "o_proj" not in path:
                    parameter += 0.1
        with pytest.warns(RankwiseWarning, match="2 of its 8 sites change nothing.*\n.*layers.0.self_attn.o_proj"):
            bank.save("a", tmp_path / "half")
