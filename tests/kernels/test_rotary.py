"""Rotary embedding against float64 autograd of the formula written out, for tensors as attention layers make them."""

import pytest
import torch
from torch import Tensor

from rankwise.kernels.rotary import rotated, serves_rotary

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"]
)


def written_out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def laid_out(layout: str, batch: int, heads: int, tokens: int, width: int) -> Tensor:
    """Random `[batch, heads, tokens, width]`: dense, a view of a projection, or a part of a joint one."""
    if layout == "dense":
        return torch.randn(batch, heads, tokens, width, dtype=torch.float64)
    joint = torch.randn(batch, tokens, heads + (layout == "part"), width, dtype=torch.float64)
    return joint[:, :, :heads].transpose(1, 2)


def angles(batch: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Unlike a model's, no two numbers are alike, so that none can stand for another."""
    cos, sin = torch.randn(2, batch, tokens, width, dtype=torch.float64)
    return cos, sin


def swapped(x: Tensor, a: int, b: int) -> Tensor:
    """The same numbers with two dimensions' places in memory exchanged."""
    return x.transpose(a, b).contiguous().transpose(a, b)


@DTYPES
@pytest.mark.parametrize("layout", ["dense", "view", "part"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("width", [16, 32, 64, 80, 128, 6])
def test_equals_float64_autograd(width, shared, layout, dtype, tolerance):
    x, grad = (laid_out(layout, 2, 3, 7, width).to(dtype) for _ in range(2))
    cos, sin = (t.to(dtype) for t in angles(1 if shared else 2, 7, width))
    low, exact = x.detach().requires_grad_(), x.double().requires_grad_()
    out = rotated(low, cos, sin)
    out.backward(grad)
    want = written_out(exact, cos.double(), sin.double())
    want.backward(grad.double())
    assert out.dtype == dtype
    assert (out.double() - want).norm() <= tolerance * want.norm()
    assert (low.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm()


@DTYPES
@pytest.mark.parametrize("layout", ["dense", "view"])
def test_keeps_the_memory_layout(layout, dtype, tolerance):
    x = laid_out(layout, 1, 3, 7, 32).to(dtype)
    cos, sin = (t.to(dtype) for t in angles(1, 7, 32))
    inner = x.clone().requires_grad_()
    out = rotated(inner, cos, sin)
    (gradient,) = torch.autograd.grad(out, inner, torch.ones(1, 3, 7, 32, dtype=dtype))
    assert x.stride() == inner.stride() == out.stride()
    assert gradient.stride() == x.stride() or not serves_rotary(x, cos, sin)


@DTYPES
def test_reads_any_strides(dtype, tolerance):
    x = torch.randn(1, 2, 9, 5, 48).to(dtype)
    cos, sin = (t.to(dtype) for t in angles(1, 5, 48))
    want = rotated(x[:, 0], cos, sin)
    assert torch.equal(rotated(swapped(x, 2, 3)[:, 0], cos, sin), want)
    assert torch.equal(rotated(x[:, 0], swapped(cos, 1, 2), swapped(sin, 1, 2)), want)
    plain = rotated(swapped(x, 3, 4)[:, 0], cos, sin)  # the kernel wants a dense last dimension
    assert (plain - want).norm() <= tolerance * want.norm()
    one = x[:, 0, :1].requires_grad_()
    out = rotated(one.expand(-1, 9, -1, -1), cos, sin)
    assert torch.equal(out, rotated(one.repeat(1, 9, 1, 1), cos, sin))
    (gradient,) = torch.autograd.grad(out.sum(), one)  # a sum's gradient has no strides at all
    torch.testing.assert_close(gradient, 9 * torch.autograd.grad(rotated(one, cos, sin).sum(), one)[0])


@DTYPES
def test_not_a_number_stays_in_its_pair(dtype, tolerance):
    x = torch.randn(1, 2, 5, 32).to(dtype)
    cos, sin = (t.to(dtype) for t in angles(1, 5, 32))
    x[0, 1, 3, 20] = torch.nan
    found = rotated(x, cos, sin).isnan().nonzero().tolist()
    assert found == [[0, 1, 3, 4], [0, 1, 3, 20]]


@DTYPES
def test_angles_that_are_trained_get_their_gradients(dtype, tolerance):
    x = torch.randn(1, 2, 5, 32).to(dtype)
    cos, sin = (t.to(dtype).requires_grad_() for t in angles(1, 5, 32))
    rotated(x, cos, sin).sum().backward()
    torch.testing.assert_close(cos.grad, x.sum(1), rtol=0.02, atol=0.02)
    assert sin.grad is not None


def test_compiled_and_plain_paths_agree():
    x = laid_out("view", 2, 3, 301, 64).bfloat16()
    cos, sin = (t.bfloat16() for t in angles(1, 301, 64))
    plain = rotated(x.float(), cos.float(), sin.float())
    assert (rotated(x, cos, sin).float() - plain).norm() <= 4e-3 * plain.norm()
