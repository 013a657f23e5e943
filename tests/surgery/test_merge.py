import pytest
import torch
from torch import nn

from rankwise.surgery import merge
from rankwise.surgery.bank import Bank
from tests.grid import relative, spec, state_of, trained


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_merge_puts_the_merged_layers_back(error, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with Bank(model) as bank:
        trained(bank, "a", spec(("0", "1")))
        before, real, calls = state_of(model), merge._probe, []

        def failing(*given):
            calls.append(given)
            if len(calls) == 2:
                raise error
            return real(*given)

        monkeypatch.setattr(merge, "_probe", failing)
        with pytest.raises(error):
            bank.merge("a")
        assert state_of(model) == before
        monkeypatch.undo()
        bank.merge("a")


@torch.no_grad()
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_padding_wider_than_the_kernel_merges(mode):
    model = nn.Sequential(nn.Conv1d(3, 3, 3), nn.Conv1d(3, 3, 1, padding=8, padding_mode=mode))
    x = torch.randn(2, 3, 20)
    with Bank(model) as bank:
        trained(bank, "a", spec(("0", "1")))
        with bank.use("a"):
            want = model(x)
        assert bank.merge("a").layers == 2
        assert relative(model(x), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_change_too_small_for_the_weights_format_is_told(dtype):
    model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    model[0].weight.fill_(1.0)
    with Bank(model) as bank:
        trained(bank, "a", spec(("0",)))
        for factors in bank.adapter("a").sites.values():
            factors.B *= 1e-9
        assert bank.merge("a").surviving < 0.5
