"""Form dora where a row of the base's weight is zero: 0 / 0 must not come out of it."""

import pytest
import torch
from torch import nn

from rankwise.surgery.bank import Bank
from tests.grid import spec


class Layer(nn.Module):
    """A linear layer of which two outputs have been pruned away."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(5, 4)
        with torch.no_grad():
            self.line.weight[[0, 2]] = 0

    def forward(self, x):
        return self.line(x)


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


def test_a_fresh_adapter_changes_nothing_and_merges():
    model = Layer()
    want = model(X).detach()
    with Bank(model) as bank:
        bank.add("a", spec(("line",), form="dora"))
        with bank.use("a"):
            torch.testing.assert_close(model(X), want)
        assert bank.adapter("a").sites["line"].changes_nothing()
        assert torch.isfinite(bank.adapter("a").sites["line"].applied(model.get_submodule("line").weight)).all()


@pytest.mark.parametrize("steps", [1, 5])
def test_it_learns_and_stays_finite_and_equal_to_what_is_merged(steps):
    model = Layer()
    with Bank(model) as bank:
        bank.add("a", spec(("line",), form="dora"))
        parameters = [parameter.requires_grad_(True) for _, parameter in bank.named_parameters("a")]
        optimiser = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(steps):
            optimiser.zero_grad()
            with bank.use("a"):
                (model(X) - 1).square().mean().backward()
            optimiser.step()
        assert all(torch.isfinite(parameter).all() for parameter in parameters)
        with bank.use("a"), torch.no_grad():
            routed = model(X)
        assert torch.isfinite(routed).all()
        bank.merge("a")
        with torch.no_grad():
            merged = model(X)
        torch.testing.assert_close(merged, routed, rtol=1e-5, atol=1e-6)
