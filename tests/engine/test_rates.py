"""LoRA+ (arXiv:2402.12354): B's rate is a multiple of A's, and a multiple of 1 is AdamW."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from rankwise.engine.rates import rates
from rankwise.engine.run import Run
from rankwise.engine.trainee import Trainee
from rankwise.surgery.bank import Bank
from tests.grid import spec, trained
from tests.models import tiny


def bank_of(form: str = "dora") -> Bank:
    bank = Bank(tiny("llama"))
    trained(bank, "a", spec(("q_proj", "embed_tokens"), form=form, modules_to_save=("lm_head",)))
    return bank


def test_every_tensor_is_in_exactly_one_group():
    with bank_of() as bank:
        groups = {rate.role: rate for rate in rates(bank, "a", Run(lr_ratio=16, weight_decay=0.1))}
        names = [name for rate in groups.values() for name in rate.names]
        assert sorted(names) == sorted(name for name, _ in bank.named_parameters("a"))
        assert len(names) == len(set(names))
        assert {role: rate.factor for role, rate in groups.items()} == {
            "A": 1, "B": 16, "m": 16, "embedding B": 1, "whole": 1
        }  # fmt: skip
        assert {role: rate.factor * rate.weight_decay for role, rate in groups.items()} == pytest.approx(
            {"A": 0.1, "B": 0.1, "m": 0, "embedding B": 0.1, "whole": 0.1}
        )


def test_rows_of_tokens_learn_at_the_run_s_rate_and_are_not_drawn_to_zero():
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(("q_proj",), new_tokens=(97, 98)))
        (own,) = [rate for rate in rates(bank, "a", Run(lr_ratio=16, weight_decay=0.1)) if rate.role == "token rows"]
        assert (own.factor, own.weight_decay) == (1, 0)
        assert own.names == ("model.embed_tokens.rows", "lm_head.rows")


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_ratio_of_one_is_adamw_to_the_bit(decay):
    with bank_of("lora") as bank:
        trainee = Trainee(bank, "a", Run(lr=1e-2, weight_decay=decay, clip=1e9), 10)
        own = {name: parameter.detach().clone().requires_grad_() for name, parameter in trainee.parameters.items()}
        reference = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=decay, fused=True)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for name, parameter in trainee.parameters.items():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                own[name].grad = parameter.grad.clone()
            trainee.step(1e-2)
            reference.step()
        assert all(torch.equal(trainee.parameters[name], own[name]) for name in own)


def test_the_fast_side_takes_so_many_times_the_step_of_the_other():
    with bank_of("lora") as bank:
        trainee = Trainee(bank, "a", Run(lr=1e-3, lr_ratio=16, clip=1e9), 10)
        before = {name: parameter.detach().clone() for name, parameter in trainee.parameters.items()}
        for parameter in trainee.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        trainee.step(1e-3)
        for name, parameter in trainee.parameters.items():
            fast = name.endswith("q_proj.B")
            torch.testing.assert_close(
                before[name] - parameter, torch.full_like(parameter, 1.6e-2 if fast else 1e-3), rtol=1e-2, atol=1e-6
            )


def test_the_groups_are_pefts():
    """Which of A and B learns how fast, as PEFT's own optimiser for LoRA+ has it."""
    ratio, lr = 16, 1e-3
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio)
    named = {parameter: name for name, parameter in model.named_parameters()}
    want = {
        named[p].removeprefix("base_model.model.").replace("lora_", "").removesuffix(".default.weight"): group["lr"]
        / lr
        for group in theirs.param_groups
        for p in group["params"]
    }
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(("q_proj", "down_proj")))
        ours = {name: rate.factor for rate in rates(bank, "a", Run(lr=lr, lr_ratio=ratio)) for name in rate.names}
    assert ours == pytest.approx(want)
