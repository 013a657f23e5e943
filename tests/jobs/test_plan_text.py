"""What is said before the first step: which tensors learn at which rate, as the optimiser has them."""

import re

import pytest
import torch

from rankwise.engine import trainee
from rankwise.jobs.train import run_training
from tests.jobs.world import Listener, request

LINE = re.compile(r"^ {12}(.+): ([\d,]+) tensors, ([\d,]+) parameters, rate (\S+), weight decay (\S+)$", re.M)
RATE = {"lr": 1e-3, "weight_decay": 0.1, "max_steps": 1, "schedule": "constant", "warmup": 0}
PLUS = {**RATE, "lr_ratio": 16, "rank": 4, "targets": "q_proj,down_proj"}

# Of two layers each of q_proj (32 → 32) and down_proj (48 → 32), by hand.
A, B = 2 * 4 * (32 + 48), 2 * 4 * (32 + 32)
FAST, SLOW = ("0.016", "0.00625"), ("0.001", "0.1")
ASKED = {
    "alike": ({**PLUS, "lr_ratio": 1}, {"A": (4, A, *SLOW), "B": (4, B, *SLOW)}),
    "LoRA+": (PLUS, {"A": (4, A, *SLOW), "B": (4, B, *FAST)}),
    "DoRA": (
        {**PLUS, "form": "dora"},
        {"A": (4, A, *SLOW), "B": (4, B, *FAST), "magnitudes": (4, 128, "0.016", "0")},
    ),
    "AdaLoRA": ({**PLUS, "form": "adalora"}, {"A": (4, A, *SLOW), "B": (4, B, *FAST), "lambda": (4, 16, *SLOW)}),
    "modules": (
        {**PLUS, "modules_to_save": "norm", "targets": "q_proj"},
        {"A": (2, 256, *SLOW), "B": (2, 256, *FAST), "trained whole": (1, 32, *SLOW)},
    ),
}


def told(world, out, **settings):
    """The groups that were told, and those that the optimiser had in its only step."""
    had = []

    class Looked(torch.optim.AdamW):
        def step(self, *given):
            for group in self.param_groups:
                sizes = [parameter.numel() for parameter in group["params"]]
                had.append((len(sizes), sum(sizes), f"{group['lr']:g}", f"{group['weight_decay']:g}"))
            return super().step(*given)

    listener = Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainee.torch.optim, "AdamW", Looked)
        run_training(request(world / "llama", world / "train.jsonl", out, **settings), listener)
    found = [
        (name, (int(n), int(size.replace(",", "")), *rest)) for name, n, size, *rest in LINE.findall(listener.texts[0])
    ]
    return dict(found), had


@pytest.mark.parametrize("asked", ASKED)
def test_the_plan_says_which_tensors_learn_at_which_rate(world, tmp_path, asked):
    settings, want = ASKED[asked]
    found, had = told(world, tmp_path / "out", **settings)
    assert found == want
    assert list(found.values()) == had


def test_of_a_model_that_is_trained_whole_all_weights_are_one_group(world, tmp_path):
    found, had = told(world, tmp_path / "out", form="full", **RATE)
    assert found.keys() == {"all weights"}
    assert list(found.values()) == had
    assert found["all weights"][2:] == SLOW
