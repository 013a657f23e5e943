import pytest
import torch

from rankwise.kernels.gain import gain_gradients, scale_columns

CASES = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.float32, 8e-3),
]


@pytest.mark.parametrize(("dtype", "wide", "tolerance"), CASES, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (7, 33), (200, 96), (0, 5)], ids=str)
def test_equals_float64_autograd(shape, biased, dtype, wide, tolerance):
    torch.manual_seed(0)
    z, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    gain = (1 + 0.3 * torch.randn(shape[1])).to(wide)
    bias = torch.randn(shape[1]).to(dtype) if biased else None
    exact = [t.double().requires_grad_() for t in (z, gain)]
    own = 0 if bias is None else bias.double()
    want = exact[1] * (exact[0] - own) + own
    want.backward(g.double())
    y, dz = z.clone(), torch.empty_like(g)
    scale_columns(y, gain, bias)
    d_gain = gain_gradients(g, y, gain, bias, dz)
    for got, expected in ((y, want), (dz, exact[0].grad), (d_gain, exact[1].grad)):
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("biased", [False, True])
def test_a_gain_of_one_changes_no_bit(dtype, biased):
    y = torch.randn(9, 40).to(dtype)
    before = y.clone()
    scale_columns(y, torch.ones(40), torch.randn(40).to(dtype) if biased else None)
    assert torch.equal(y, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gain_of_zero_stays_finite(dtype):
    y, g, gain = torch.randn(9, 16).to(dtype), torch.randn(9, 16).to(dtype), torch.ones(16)
    gain[3] = 0
    scale_columns(y, gain, None)
    found = gain_gradients(g, y, gain, None, torch.empty_like(g))
    assert found.isfinite().all()
    assert found[3] == 0
