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


BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@BOTH
@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 577])
def test_every_width_and_a_single_row_are_served(width, dtype):
    x, weight = torch.randn(1, width).to(dtype), torch.randn(width).to(dtype)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert (rms_norm(x, weight, 1e-5).double() - want).norm() <= 4e-3 * want.norm()


@BOTH
def test_no_rows_give_no_rows(dtype):
    assert rms_norm(torch.empty(0, 8, dtype=dtype), torch.ones(8, dtype=dtype), 1e-5).shape == (0, 8)


@BOTH
def test_tensors_may_lie_in_memory_as_they_like(dtype):
    """Rows and weight with gaps, and a gradient that is one number repeated."""
    x, weight = torch.randn(6, 40).to(dtype), torch.randn(40).to(dtype)
    gaps_x, gaps_weight = torch.full((6, 80), torch.nan, dtype=dtype), torch.full((80,), torch.nan, dtype=dtype)
    gaps_x[:, ::2], gaps_weight[::2] = x, weight
    found = []
    for rows, gains in ((x, weight), (gaps_x[:, ::2], weight), (x.t().contiguous().t(), weight), (x, gaps_weight[::2])):
        low = rows.detach().requires_grad_()
        out = rms_norm(low, gains, 1e-5, 1.0)
        out.sum().backward()
        found.append((out, low.grad))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_spoils_its_row_and_no_other(bad, dtype):
    x, weight = torch.randn(3, 40).to(dtype), torch.ones(40, dtype=dtype)
    x[1, 7] = bad
    low = x.requires_grad_()
    out = rms_norm(low, weight, 1e-5)
    out.sum().backward()
    for found in (out, low.grad):
        assert found.isfinite().all(-1).tolist() == [True, False, True]


@BOTH
def test_a_row_of_zeros_stays_one(dtype):
    low = torch.zeros(2, 24, dtype=dtype, requires_grad=True)
    out = rms_norm(low, torch.ones(24, dtype=dtype), 1e-5)
    out.sum().backward()
    assert out.eq(0).all()
    assert low.grad.isfinite().all()


@BOTH
def test_the_weight_is_a_constant(dtype):
    weight = torch.ones(24, dtype=dtype, requires_grad=True)
    rms_norm(torch.randn(2, 24).to(dtype).requires_grad_(), weight, 1e-5).sum().backward()
    assert weight.grad is None
