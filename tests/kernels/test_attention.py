"""Each document of a stream attends to itself alone; every path agrees with float64 attention written out."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rankwise.kernels.attention import Spans, _alike, attend
from rankwise.kernels.library import native

pytestmark = pytest.mark.usefixtures("words")

SHAPES = [  # heads, groups, width, lengths, and what each segment continues
    (9, 3, 64, (376, 20), ()),
    (4, 4, 32, (5, 77, 1), ()),
    (4, 2, 128, (130, 64), ()),
    (2, 1, 80, (97, 96, 95), ()),
    (3, 1, 16, (200,), ()),
    (2, 2, 256, (40, 17), ()),
    (4, 2, 32, (24, 100, 1, 77), (-1, 0, 0, 0)),
    (6, 2, 64, (9, 30, 3, 21, 5, 17, 60, 8, 40), (-1, -1, 1, 2, 2, 4, 1, -1, 7)),
    (2, 1, 16, (150, 49, 1), (-1, 0, 1)),
]


def reference(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    rows = []
    for i, (start, stop) in enumerate(pairwise(spans.bounds)):
        seen, before = torch.arange(start, stop), spans.after[i] if spans.after else -1
        while before >= 0:
            seen = torch.cat([torch.arange(spans.bounds[before], spans.bounds[before + 1]), seen])
            before = spans.after[before]
        own = torch.arange(len(seen))[-(stop - start) :]
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[seen]) * scale
        distance = own[:, None] - torch.arange(len(seen))
        hidden = (distance < 0) | ((distance >= window) if window else False)
        rows.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[seen]))
    return torch.cat(rows)


def case(
    heads: int, groups: int, width: int, lengths: tuple[int, ...], after: tuple[int, ...] = ()
) -> tuple[list[Tensor], Spans]:
    torch.manual_seed(0)
    n = sum(lengths)
    bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
    return [torch.randn(n, h, width, dtype=torch.float64) for h in (heads, groups, groups, heads)], Spans(bounds, after)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_equals_float64(shape, dtype, tolerance, window):
    tensors, spans = case(*shape)
    low = [x.to(dtype) for x in tensors]
    inputs = [x.detach().requires_grad_() for x in low[:3]]
    exact = [x.double().requires_grad_() for x in low[:3]]
    scale = shape[2] ** -0.5
    out = attend(*inputs, spans, scale, window)
    out.backward(low[3])
    expected = reference(*exact, spans, scale, window)
    expected.backward(low[3].double())
    for got, want in [(out, expected), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]:
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_compiled_and_plain_paths_agree():
    tensors, spans = case(6, 2, 64, (120, 31))
    low = [x.bfloat16() for x in tensors]
    out = attend(*low[:3], spans, 0.125)
    plain = attend(*(x.float() for x in low[:3]), spans, 0.125)
    assert (out.float() - plain).abs().max() < 0.02


def test_reads_any_strides():
    tensors, spans = case(4, 2, 32, (50, 9))
    low = [x.bfloat16() for x in tensors]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in low]
    assert torch.equal(attend(*low[:3], spans, 0.2), attend(*strided[:3], spans, 0.2))


def test_a_document_does_not_see_its_neighbours():
    tensors, spans = case(4, 2, 32, (50, 60))
    low = [x.bfloat16() for x in tensors]
    before = attend(*low[:3], spans, 0.2)[50:]
    for x in low[:3]:
        x[:50] = 7.0
    assert torch.equal(attend(*low[:3], spans, 0.2)[50:], before)


def test_not_a_number_comes_through():
    tensors, spans = case(2, 2, 32, (20, 20))
    low = [x.bfloat16() for x in tensors]
    low[0][3, 0, 0] = torch.nan
    out = attend(*low[:3], spans, 0.2)
    assert out[3, 0].isnan().all()
    assert out[20:].isfinite().all()


@pytest.mark.parametrize(("width", "values"), [(64, 32), (32, 64), (48, 16)])
def test_values_of_another_width_than_keys_go_the_plain_way(width, values):
    """As in latent attention (DeepSeek's MLA): the C side is told one width for all."""
    tensors, spans = case(4, 2, width, (50, 9))
    q, k = (x.bfloat16().requires_grad_() for x in tensors[:2])
    v = torch.randn(59, 2, values).bfloat16().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, want = attend(q, k, v, spans, 0.2), reference(*exact, spans, 0.2, 0)
    assert out.shape == want.shape
    out.sum().backward()
    want.sum().backward()
    for got, true in [(out, want), (q.grad, exact[0].grad), (k.grad, exact[1].grad), (v.grad, exact[2].grad)]:
        assert (got.double() - true).norm() <= 3e-2 * true.norm()


@pytest.mark.parametrize(
    ("q", "k", "v", "served"),
    [
        ((5, 4, 32), (5, 2, 32), (5, 2, 32), True),
        ((5, 4, 32), (5, 2, 32), (5, 2, 16), False),
        ((5, 4, 32), (5, 2, 48), (5, 2, 32), False),
        ((5, 4, 32), (5, 3, 32), (5, 3, 32), False),
        ((5, 4, 32), (5, 2, 32), (5, 4, 32), False),
        ((5, 4, 24), (5, 2, 24), (5, 2, 24), False),
        ((6, 4, 32), (5, 2, 32), (5, 2, 32), False),
    ],
)
def test_only_shapes_that_the_compiled_kernel_reads_within_bounds_reach_it(q, k, v, served):
    assert _alike(*(torch.zeros(shape) for shape in (q, k, v))) == served


@pytest.mark.skipif(native() is None, reason="no compiled kernels here")
def test_denormal_numbers_are_zeros_and_only_here():
    """As `vdpbf16ps` has them; `vfmadd` would take two hundred times as long over them."""
    tensors, spans = case(2, 2, 32, (20, 20))
    q, k, _, _ = (x.bfloat16() for x in tensors)
    v = torch.full((40, 2, 32), 1e-39).bfloat16()
    q.requires_grad_()
    out = attend(q, k, v, spans, 0.2)
    out.backward(torch.full_like(out, 1e38))
    assert not out.any()
    assert not q.grad.any()
    assert torch.full((1,), 1e-39).mul(0.5) > 0
