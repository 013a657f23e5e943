import pytest
import torch

from rankwise.kernels.norm import rms_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 7, 576), (3, 40), (2, 1)], ids=str)
def test_equals_float64_autograd(shape, offset, dtype, tolerance):
    torch.manual_seed(0)
    x, grad = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], dtype=torch.float64).to(dtype)
    low, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out = rms_norm(low, weight, 1e-5, offset)
    out.backward(grad)
    want = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (offset + weight.double())
    want.backward(grad.double())
    assert (out.double() - want).norm() <= tolerance * want.norm()
    assert (low.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm() + 1e-6
