"""The fused product against autograd of the plain formula, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.adapters.dropout import keep_mask
from rankwise.adapters.product import low_rank_product
from rankwise.kernels.lowrank import Part


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part]) -> Tensor:
    rows = list((x @ weight.t()).unbind())
    for part in parts:
        for n in range(part.start, part.stop):
            own = x[n] if part.keep is None else x[n] * part.keep[n - part.start] / (1 - part.dropout)
            rows[n] = (rows[n] + part.scale * (part.B @ (part.A @ own))) * (1 if part.gain is None else part.gain)
    return torch.stack(rows) + (0 if bias is None else bias)


@st.composite
def problems(draw):
    rows, inputs, outputs = (draw(st.integers(1, 9)) for _ in range(3))
    cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=0, max_size=6)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
    ranks = [draw(st.integers(1, 4)) for _ in spans]
    return (
        rows,
        inputs,
        outputs,
        spans,
        ranks,
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 0.5])),
        draw(st.integers(0, 2)),
    )


@given(problems())
@settings(max_examples=60, deadline=None)
def test_value_and_gradients_equal_autograd(problem):
    rows, inputs, outputs, spans, ranks, biased, dropout, gained = problem
    generator = torch.Generator().manual_seed(rows * 100 + inputs)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight = draw(rows, inputs).requires_grad_(), draw(outputs, inputs)
    bias = draw(outputs) if biased else None
    parts = []
    for (start, stop), rank in zip(spans, ranks, strict=True):
        keep = keep_mask(torch.Size((stop - start, inputs)), dropout, start, x.device) if dropout else None
        A, B = draw(rank, inputs).requires_grad_(), draw(outputs, rank).requires_grad_()
        gain = draw(outputs).requires_grad_() if gained > len(parts) else None
        parts.append(Part(start, stop, A, B, 1.7, dropout, keep, gain))
    leaves = [x, *(t for part in parts for t in (part.A, part.B, part.gain) if t is not None)]
    grad = draw(rows, outputs)
    got = low_rank_product(x, weight, bias, parts)
    want = plain(x, weight, bias, parts)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_weight_gets_no_gradient_and_neither_does_an_input_that_needs_none():
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    A, B = torch.randn(2, 3, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    low_rank_product(x, weight, None, [Part(0, 4, A, B, 1.0)]).sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    assert x.grad is None
    assert weight.grad is None


def test_only_the_input_and_the_shrink_are_kept():
    """What is saved for the backward pass, beside weights: x and [N, R] (the law of performance.md §2)."""
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(48, 32)
    A, B = torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    known = {t.data_ptr() for t in (weight, A, B)}
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        low_rank_product(x, weight, None, [Part(0, 64, A, B, 2.0)])
    assert sorted(kept) == [(64, 4), (64, 32)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_stay_float32_beside_a_low_precision_base(dtype):
    x, weight = torch.randn(6, 8, dtype=dtype, requires_grad=True), torch.randn(4, 8, dtype=dtype)
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    out = low_rank_product(x, weight, None, [Part(0, 6, A, B, 0.5)])
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert A.grad.dtype == B.grad.dtype == torch.float32
