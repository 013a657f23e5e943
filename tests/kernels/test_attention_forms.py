"""Attention in all its forms on both its paths: caps, windows, shared heads, odd sizes, and tensors laid any way.

What decides between the paths is in `attend`: the compiled one takes bfloat16 whose heads lie dense in memory, widths
that are multiples of 16, and no cap.  So the very same numbers go the plain way once their last dimension has gaps.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rankwise.kernels.attention import Spans, attend
from rankwise.kernels.library import native

pytestmark = pytest.mark.usefixtures("words")

LENGTHS = [(33,), (1,), (1, 1, 1), (17, 1, 40, 2), (15, 16, 17), (130, 49)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """The definition, token by token: what it may see, its scores, the cap, the weighted sum."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    rows = []
    for start, stop in pairwise(spans.bounds):
        for t in range(start, stop):
            first, end = max(start, t + 1 - window) if window else start, t + 1 if causal else stop
            scores = torch.einsum("hd,khd->hk", q[t], k[first:end]) * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[first:end]))
    return torch.stack(rows)


def case(
    heads: int, groups: int, width: int, lengths: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[Tensor], Spans]:
    n, bounds = sum(lengths), (0, *torch.tensor(lengths).cumsum(0).tolist())
    return [(1.5 * torch.randn(n, h, width)).to(dtype) for h in (heads, groups, groups, heads)], Spans(bounds)


def gapped(x: Tensor) -> Tensor:
    """The same numbers, every second place in memory."""
    wide = torch.empty(*x.shape, 2, dtype=x.dtype)
    wide[..., 0], wide[..., 1] = x, torch.nan
    return wide[..., 0].detach()


def check(low: list[Tensor], spans: Spans, dtype: torch.dtype, **form) -> None:
    """Output and all three gradients against float64."""
    scale = low[0].shape[-1] ** -0.5
    inputs, exact = [x.requires_grad_() for x in low[:3]], [x.double().detach().requires_grad_() for x in low[:3]]
    out, want = attend(*inputs, spans, scale, **form), written_out(*exact, spans, scale, **form)
    assert out.dtype == dtype
    out.backward(low[3])
    want.backward(low[3].double())
    pairs = [(out, want), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    for name, (got, expected) in zip(("out", "q", "k", "v"), pairs, strict=True):
        assert got.shape == expected.shape
        got, expected = got.detach().double(), expected.detach()
        # where a token sees itself alone, q and k have no gradient at all; what comes in is the measure then
        size = max(float(expected.norm()), 0.1 * float(low[3].double().norm()))
        assert float((got - expected).norm()) <= TOLERANCE[dtype] * size, name


FORMS = [
    {"softcap": 5.0},
    {"softcap": 2.0, "window": 4},
    {"window": 1},
    {"window": 7},
    {"window": 1000},
    {},
    {"causal": False},
    {"causal": False, "softcap": 5.0},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_form_equals_its_definition(form, lengths, heads, dtype):
    low, spans = case(*heads, 32, lengths, dtype)
    check(low, spans, dtype, **form)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bfloat16_on_the_plain_path_equals_it_too(form, lengths):
    low, spans = case(6, 2, 32, lengths, torch.bfloat16)
    check([*(gapped(x) for x in low[:3]), low[3]], spans, torch.bfloat16, **form)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("width", [1, 2, 8, 24, 40, 100])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_widths_that_the_compiled_kernel_does_not_take_are_served_all_the_same(width, window, dtype):
    low, spans = case(4, 2, width, (20, 3), dtype)
    check(low, spans, dtype, window=window)


def test_where_there_is_a_compiled_path_it_is_the_one_that_is_tested():
    """It rounds once, the plain path more often, so the last bits tell them apart."""
    low, spans = case(6, 2, 32, (40, 30), torch.bfloat16)
    same = torch.equal(attend(*low[:3], spans, 0.2), attend(*(gapped(x) for x in low[:3]), spans, 0.2))
    assert native() is None or not same


# ── how tensors lie in memory ────────────────────────────────────────────────────────────────────────────────────────


def laid(x: Tensor, way: str) -> Tensor:
    if way == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if way == "a slice of more heads":
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]]
    if way == "a slice of more tokens":
        return torch.cat([torch.full_like(x[:3], torch.nan), x, torch.full_like(x[:1], torch.nan)])[3:-1]
    if way == "a slice of wider heads":
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[..., : x.shape[2]]
    return gapped(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "way", ["heads first", "a slice of more heads", "a slice of more tokens", "a slice of wider heads", "gaps"]
)
def test_tensors_may_lie_in_memory_as_they_like(way, dtype):
    low, spans = case(4, 2, 32, (21, 9), dtype)
    check([laid(x, way).detach() for x in low], spans, dtype, window=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_one_number_repeated_is_read_as_such(dtype):
    """`out.sum().backward()` hands on a tensor without strides."""
    low, spans = case(4, 2, 32, (21, 9), dtype)
    found = []
    for grad in (torch.ones_like(low[0]), torch.ones((), dtype=dtype).expand_as(low[0])):
        inputs = [x.clone().requires_grad_() for x in low[:3]]
        attend(*inputs, spans, 0.2).backward(grad)
        found.append([x.grad for x in inputs])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_inputs_are_left_alone():
    low, spans = case(4, 2, 32, (21, 9), torch.bfloat16)
    before = [x.clone() for x in low]
    inputs = [x.requires_grad_() for x in low[:3]]
    attend(*inputs, spans, 0.2).backward(low[3])
    assert all(torch.equal(x, y) for x, y in zip(low, before, strict=True))


# ── numbers that are none ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("form", [{}, {"window": 4}, {"softcap": 5.0}, {"causal": False}], ids=str)
@pytest.mark.parametrize("lengths", [(5, 7, 3), (20, 40, 18)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_not_a_number_comes_through_and_stays_in_its_document(bad, which, form, lengths, dtype):
    """Short documents too: torch's own kernel gives 0 where all scores of a token are NaN and fewer than 16."""
    low, spans = case(4, 2, 32, lengths, dtype)
    clean = attend(*low[:3], spans, 0.2, **form)
    start, stop = spans.bounds[1:3]
    for x in low[:2]:
        x[start, :, 0] = 1.0  # so that an infinite score is a positive one
    low[which][start, :, 0] = bad
    inputs = [x.requires_grad_() for x in low[:3]]
    out = attend(*inputs, spans, 0.2, **form)
    capped = bad == float("inf") and which < 2 and "softcap" in form  # a cap makes a number of an infinite score
    assert bool(out[start, :, 0].isfinite().any()) == capped
    assert torch.equal(out[:start], clean[:start])
    assert torch.equal(out[stop:], clean[stop:])
    out.backward(low[3])
    for x in inputs:
        assert x.grad[:start].isfinite().all()
        assert x.grad[stop:].isfinite().all()
    if not capped:
        assert not all(x.grad[start:stop].isfinite().all() for x in inputs), "the gradient hides it"
