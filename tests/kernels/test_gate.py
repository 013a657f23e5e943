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
