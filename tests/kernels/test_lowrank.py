"""The compiled product against float64 autograd of the formula: every way to lay out rows, factors, masks and gains."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.adapters.product import low_rank_product
from rankwise.kernels.library import native
from rankwise.kernels.lowrank import Part, serves_product

pytestmark = [
    pytest.mark.skipif(native() is None, reason="no compiled kernels here"),
    pytest.mark.usefixtures("words"),
]

_ROUNDED = 8e-3  # bfloat16 in and out, with the shrink rounded between


@st.composite
def problems(draw):
    rows = draw(st.integers(32, 230))
    inputs, outputs = 2 * draw(st.integers(4, 90)), 2 * draw(st.integers(4, 90))  # fewer, and one rounding shows
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=6, unique=True)))
    parts = []
    for start, stop in zip(cuts[::2], cuts[1::2], strict=False):
        rank, scale = draw(st.integers(1, 40)), draw(st.sampled_from([0.5, 1.7, 2.0]))
        parts.append((start, stop, rank, scale, draw(st.sampled_from([0.0, 0.3])), draw(st.booleans())))
    return rows, inputs, outputs, parts, draw(st.booleans()), draw(st.booleans()), draw(st.booleans())


def written_out(x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part]) -> Tensor:
    pieces, done = [], 0
    for part in parts:
        own = x[part.start : part.stop]
        kept = own if part.keep is None else own * part.keep / (1 - part.dropout)
        z = own @ weight.t() + part.scale * (kept @ part.A.t()) @ part.B.t()
        pieces += [x[done : part.start] @ weight.t(), z if part.gain is None else z * part.gain]
        done = part.stop
    pieces.append(x[done:] @ weight.t())
    return torch.cat(pieces) + (0 if bias is None else bias)


def relative(got: Tensor, want: Tensor, floor: float) -> float:
    return float((got.detach().double() - want.detach()).norm() / max(float(want.detach().norm()), floor))


def sizes(part: Part, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """What each gradient of a part would measure if its terms had these sizes and no signs in common.

    A gradient whose terms happen to cancel is far smaller than they are, and its error is theirs.
    """
    x, grad = x[part.start : part.stop].square(), grad[part.start : part.stop].square()
    A, B, scale = part.A.square(), part.B.square(), part.scale**2
    y = x @ weight.square().t() + scale * (x @ A.t()) @ B.t()
    through = grad if part.gain is None else grad * part.gain.square()
    found = {"A": scale * (through @ B).t() @ x, "B": scale * through.t() @ (x @ A.t()), "gain": (grad * y).sum(0)}
    return {name: terms.detach().sqrt() for name, terms in found.items()}


def check(rows, inputs, outputs, wanted, biased, across, strided) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + inputs)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wide = draw(rows, 2 * inputs if strided else inputs).bfloat16()
    x = wide[:, :inputs].requires_grad_()
    weight = (draw(outputs, inputs) / inputs**0.5).bfloat16()
    weight = weight.t().contiguous().t() if across else weight
    bias = draw(outputs).bfloat16() if biased else None
    parts, exact = [], []
    for start, stop, rank, scale, dropout, gained in wanted:
        keep = torch.rand(stop - start, inputs, generator=generator) > dropout if dropout else None
        A, B = (draw(rank, inputs) / inputs**0.5).requires_grad_(), (draw(outputs, rank) / 4).requires_grad_()
        gain = torch.rand(outputs, generator=generator).add(0.5).requires_grad_() if gained else None
        parts.append(Part(start, stop, A, B, scale, dropout, keep, gain))
        twins = [None if t is None else t.detach().double().requires_grad_() for t in (A, B, gain)]
        exact.append(Part(start, stop, twins[0], twins[1], scale, dropout, keep, twins[2]))
    twin = x.detach().double().requires_grad_()
    assert serves_product(x, weight, bias, parts)
    got = low_rank_product(x, weight, bias, parts, compiled=True)
    want = written_out(twin, weight.double(), None if bias is None else bias.double(), exact)
    grad = draw(rows, outputs).bfloat16()
    got.backward(grad)
    want.backward(grad.double())
    size = float(grad.norm())
    assert relative(got, want, 1e-9) < _ROUNDED
    with torch.no_grad():
        assert torch.equal(low_rank_product(x, weight, bias, parts, compiled=True), got)
    assert relative(x.grad, twin.grad, 0.05 * size) < _ROUNDED
    for part, true in zip(parts, exact, strict=True):
        floors = sizes(true, twin, weight.double(), grad.double())
        for name in ("A", "B", "gain"):
            if getattr(part, name) is not None:
                found, known = getattr(part, name).grad, getattr(true, name).grad
                assert found.dtype == torch.float32
                assert relative(found, known, float(floors[name].norm())) < _ROUNDED, name


@given(problems())
@settings(max_examples=80, deadline=None)
def test_value_and_gradients_equal_float64(problem):
    check(*problem)


@pytest.mark.parametrize("across", [False, True])
def test_a_weight_too_large_to_be_laid_out_at_once(across):
    check(64, 5000, 3002, [(0, 30, 8, 1.7, 0.05, True), (31, 64, 20, 1.0, 0.0, False)], True, across, False)


def test_one_thread_gives_what_two_give_but_for_sums_over_rows():
    x, weight = torch.randn(99, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    A, B = torch.randn(4, 64), torch.randn(48, 4)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(low_rank_product(x, weight, None, [Part(0, 99, A, B, 2.0)], compiled=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_it_does_not_serve_goes_the_plain_way():
    weight, part = torch.randn(48, 64).bfloat16(), [Part(0, 3, torch.randn(4, 64), torch.randn(48, 4), 2.0)]
    x = torch.randn(99, 64).bfloat16()
    assert serves_product(x, weight, None, part)
    assert not serves_product(x[:9], weight, None, part), "too few rows to pay"
    assert not serves_product(x.float(), weight.float(), None, part)
    assert not serves_product(x[:, :-1], weight[:, :-1], None, [])
    assert not serves_product(x, weight[:-1], None, [])
    assert not serves_product(x, torch.randn(48, 128).bfloat16()[:, ::2], None, part)


def test_numbers_that_are_none_come_through():
    x, weight = torch.randn(99, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    x[40, 7] = torch.nan
    y = low_rank_product(x, weight, None, [Part(0, 99, torch.randn(4, 64), torch.randn(48, 4), 2.0)], compiled=True)
    assert y[40].isnan().all()
    assert y[:40].isfinite().all()
    assert y[41:].isfinite().all()


def test_denormal_numbers_are_zeros_and_only_here():
    """As `vdpbf16ps` has them; `vfmadd` would take two hundred times as long over them."""
    x, weight = torch.full((99, 64), 1e-39).bfloat16(), torch.full((48, 64), 1e10).bfloat16()
    assert x[0, 0] > 0
    assert not low_rank_product(x, weight, None, [], compiled=True).any()
    assert torch.equal(x.float() * 0.5, torch.full((99, 64), float(x[0, 0]) / 2))
    assert torch.full((1,), 1e-39).mul(0.5) > 0
