"""PEFT's AdaLoRA folders, which hold a diagonal beside the factors and a rank that is not the tensors'."""

import peft
import pytest
import torch

from rankwise.surgery.bank import Bank
from tests.formats.test_peft import exactly, model_of
from tests.grid import relative
from tests.models import output, tiny

SCHEDULE = {"total_step": 10, "tinit": 1, "tfinal": 2, "deltaT": 1}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_what_peft_trains_by_adalora_does_the_same_here(pruned, tmp_path):
    """Before and after PEFT has given some layers less, and one nothing."""
    model, inputs = model_of("llama")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=7, target_modules=["q_proj", "down_proj"], **SCHEDULE)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for step in range(10 if pruned else 1):
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
                size = 0 if "layers.0.self_attn" in name else 1
                parameter.grad = size * torch.randn(parameter.shape, generator=generator)
        if pruned:
            wrapped.base_model.update_and_allocate(step)
    wrapped.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        want = exactly(wrapped, inputs)
    bank = Bank(tiny("llama"))
    bank.load("theirs", tmp_path)
    with bank.use("theirs"), torch.no_grad():
        torch.testing.assert_close(output(bank.model, inputs), want, rtol=1e-5, atol=1e-5)
    ranks = [factors.rank for factors in bank.adapter("theirs").sites.values()]
    assert sum(ranks) == (8 if pruned else 16)
    bank.save("theirs", tmp_path / "ours")
    bank.load("again", tmp_path / "ours")
    for path, factors in bank.adapter("again").sites.items():
        assert relative(factors.delta(), bank.adapter("theirs").sites[path].delta()) < 1e-6
