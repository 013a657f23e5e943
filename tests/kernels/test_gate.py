import pytest
import torch

from rankwise.kernels.gate import ACTIVATIONS, gated


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 9, 96), (5, 3)], ids=str)
def test_equals_float64_autograd(shape, activation, dtype, tolerance):
    torch.manual_seed(0)
    gate, up, grad = ((3 * torch.randn(shape, dtype=torch.float64)).to(dtype) for _ in range(3))
    low = [x.clone().requires_grad_() for x in (gate, up)]
    exact = [x.double().requires_grad_() for x in (gate, up)]
    out = gated(*low, activation)
    out.backward(grad)
    want = ACTIVATIONS[activation](exact[0]) * exact[1]
    want.backward(grad.double())
    for got, expected in [(out, want), *((a.grad, b.grad) for a, b in zip(low, exact, strict=True))]:
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


def test_extreme_gates_stay_finite():
    gate = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30], dtype=torch.bfloat16).repeat(7).requires_grad_()
    up = torch.ones_like(gate)
    for activation in ACTIVATIONS:
        out = gated(gate, up, activation)
        out.sum().backward()
        assert out.isfinite().all()
    assert gate.grad.isfinite().all()


BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@BOTH
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000])
def test_every_size_is_served(size, activation, dtype):
    gate, up = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    want = ACTIVATIONS[activation](gate.double()) * up.double()
    assert (gated(gate, up, activation).double() - want).norm() <= 4e-3 * want.norm()


@BOTH
def test_tensors_may_lie_in_memory_as_they_like(dtype):
    """The two halves of one product, as in Phi 3, rows turned round, and a gradient that is one number repeated."""
    both = torch.randn(6, 80).to(dtype)
    halves, turned = both.chunk(2, dim=-1), [x.t().contiguous().t() for x in both.chunk(2, dim=-1)]
    found = []
    for gate, up in ([x.contiguous() for x in halves], halves, turned):
        low = [x.detach().requires_grad_() for x in (gate, up)]
        out = gated(*low, "silu")
        out.sum().backward()
        found.append([out, low[0].grad, low[1].grad])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@BOTH
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("which", [0, 1], ids=["gate", "up"])
def test_not_a_number_comes_through_at_its_place_alone(which, activation, dtype):
    low = [torch.randn(40).to(dtype) for _ in range(2)]
    low[which][7] = torch.nan
    low = [x.requires_grad_() for x in low]
    out = gated(*low, activation)
    out.sum().backward()
    place = torch.arange(40) == 7
    assert torch.equal(out.isnan(), place)
    assert torch.equal(low[0].grad.isnan(), place)
    assert torch.equal(low[1].grad.isnan(), place if which == 0 else torch.zeros_like(place))


@BOTH
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinity_does_not_become_a_number(activation, dtype):
    up = torch.ones(3, dtype=dtype)
    assert not gated(torch.tensor([torch.inf] * 3, dtype=dtype), up, activation).isfinite().any()
    assert not gated(up, torch.tensor([torch.inf, -torch.inf, torch.inf], dtype=dtype), activation).isfinite().any()
