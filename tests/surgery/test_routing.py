import pytest
import torch
import transformers as hf
from torch import nn

from rankwise.errors import RankwiseWarning, RouteError
from rankwise.surgery.bank import Bank
from tests.grid import relative, spec, trained
from tests.models import output, tiny, words


def switch() -> nn.Module:
    torch.manual_seed(0)
    return hf.SwitchTransformersEncoderModel(
        hf.SwitchTransformersConfig(
            vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=3,
            num_sparse_encoder_layers=1, encoder_sparse_step=1, expert_capacity=64, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("rows", range(2, 8))
def test_the_tokens_of_an_expert_are_not_taken_for_rows(rows):
    model = switch()
    with Bank(model) as bank:
        trained(bank, "a", spec(("wi",)), seed=1)
        trained(bank, "b", spec(("wi",)), seed=2)
        with bank.route(["a"] + ["b"] * (rows - 1)), pytest.raises(RouteError, match="one by one"):
            output(model, words(rows))
        with bank.use("b"):
            want = output(model, words(rows))
        with bank.route(["b"] * rows):
            assert torch.equal(output(model, words(rows)), want)


class Dispatch(nn.Module):
    """Sends its tokens to one layer in another order, as mixtures do, under no name that gives it away."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).flip(0)
        return self.inner(flat).flip(0).reshape(x.shape)


@torch.no_grad()
def test_a_flat_input_is_taken_for_rows_only_where_its_parent_saw_rows():
    model = nn.Sequential(Dispatch())
    with Bank(model) as bank:
        trained(bank, "a", spec(("inner.0",)))
        with bank.route(["a", None]), pytest.raises(RouteError):
            model(torch.randn(2, 3, 4))


@torch.no_grad()
def test_plain_rows_and_layers_called_directly_still_route():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    with Bank(model) as bank:
        trained(bank, "a", spec(("0", "1")))
        with bank.use("a"):
            want = model(x), model[0](x)
        with bank.route(["a", None]):
            assert relative(model(x)[0], want[0][0]) < 1e-5
            assert relative(model[0](x)[0], want[1][0]) < 1e-5


@torch.no_grad()
def test_a_flattening_model_called_below_its_head_still_routes():
    model, inputs = tiny("opt"), words(3)
    with Bank(model) as bank:
        trained(bank, "a", spec(("fc1", "fc2")))
        with bank.use("a"):
            want = model.base_model(**inputs)[0]
        with bank.route(["a", None, "a"]):
            got = model.base_model(**inputs)[0]
        assert relative(got[0], want[0]) < 1e-5
        assert relative(got[2], want[2]) < 1e-5


def test_each_pass_under_one_route_draws_its_own_mask():
    model, inputs = tiny("llama"), words(2)
    with Bank(model) as bank, torch.no_grad():
        trained(bank, "a", spec("minimal", dropout=0.5))
        model.train()
        with bank.use("a"):
            first, second = output(model, inputs), output(model, inputs)
        assert not torch.equal(first, second)
        with bank.route(["a", "a"], tick=3):
            fixed = [output(model, inputs)]
            with bank.use("a"):
                fixed.append(output(model, inputs))
            fixed.append(output(model, inputs))
        assert torch.equal(fixed[0], fixed[1])
        assert torch.equal(fixed[0], fixed[2])


@pytest.mark.parametrize("passes", [1, 2])
def test_recomputation_meets_the_mask_of_its_own_pass(passes):
    gradients = []
    for checkpointed in (False, True):
        model = tiny("llama").train()
        with Bank(model) as bank:
            trained(bank, "a", spec("minimal", dropout=0.5))
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with bank.use("a"):
                for _ in range(passes):
                    output(model, words(2)).square().mean().backward()
            gradients.append([p.grad for _, p in bank.named_parameters("a")])
    for plain, again in zip(*gradients, strict=True):
        assert relative(again, plain) < 1e-5


def test_training_outside_any_route_says_that_nothing_learns(recwarn):
    model, inputs = tiny("llama").train(), words(2)
    with Bank(model) as bank:
        bank.add("a", spec("minimal"))
        with pytest.warns(RankwiseWarning, match=r"no route.*bank\.use"):
            model(**inputs)
        recwarn.clear()
        with torch.no_grad():
            model(**inputs)
        for name in ("a", None):
            with bank.use(name):
                model(**inputs)
        model.eval()
        model(**inputs)
    model.train()(**inputs)
    assert not recwarn.list
