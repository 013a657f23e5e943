"""Attention through a cache: every path against float64 attention written out, over texts that come in pieces."""

import pytest
import torch
from torch import Tensor

from rankwise.kernels.cached import Look, Piece, Pieces, attend_cached

BLOCK = 16
SHAPES = [(9, 3, 64), (4, 4, 32), (2, 1, 80), (3, 3, 24), (4, 2, 256)]  # heads, groups, width
LOOKS = [Look(0.2), Look(0.2, window=7), Look(0.2, softcap=3.0), Look(0.2, window=33, softcap=2.0)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}
# Steps, each of pieces (text, tokens): beginnings of texts, single tokens, long pieces of a long past, all at once.
STEPS = [[(0, 5), (1, 40)], [(0, 1), (1, 1)], [(2, 70), (0, 1), (1, 30)], [(2, 1), (0, 20), (1, 3)], [(2, 1)]]
LENGTHS = (27, 74, 72)
BLOCKS = ([7, 2], [0, 9, 4, 3, 8], [12, 1, 13, 5, 6])


def reference(q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
    """A whole text's attention to itself."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * look.scale
    scores = look.softcap * torch.tanh(scores / look.softcap) if look.softcap else scores
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) | ((distance >= look.window) if look.window else False)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("look", LOOKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_texts_in_pieces_attend_as_whole_ones_do(shape, dtype, look):
    torch.manual_seed(0)
    heads, groups, width = shape
    texts = [[torch.randn(n, h, width).to(dtype) for h in (heads, groups, groups)] for n in LENGTHS]
    keys, values = (torch.full((BLOCK * 14, groups, width), torch.nan, dtype=dtype) for _ in range(2))
    got: list[list[Tensor]] = [[], [], []]
    done = [0, 0, 0]
    for step in STEPS:
        pieces, parts, at = [], [], 0
        for which, count in step:
            parts.append([x[done[which] : done[which] + count] for x in texts[which]])
            done[which] += count
            pieces.append(Piece(at, at + count, done[which], BLOCKS[which]))
            at += count
        q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))
        out = attend_cached(q, k, v, keys, values, Pieces(pieces, BLOCK, torch.device("cpu")), look)
        for (which, _), piece in zip(step, pieces, strict=True):
            got[which].append(out[piece.start : piece.stop])
    for text, pieces_of_it, count in zip(texts, got, done, strict=True):
        expected = reference(*(x[:count].double() for x in text), look)
        difference = torch.cat(pieces_of_it).double() - expected
        assert float(difference.norm() / expected.norm()) < TOLERANCE[dtype]


def test_values_may_be_of_another_width_than_keys():
    q, k, v = torch.randn(5, 2, 24), torch.randn(5, 2, 24), torch.randn(5, 2, 8)
    keys, values = torch.zeros(BLOCK, 2, 24), torch.zeros(BLOCK, 2, 8)
    out = attend_cached(q, k, v, keys, values, Pieces([Piece(0, 5, 5, [0])], BLOCK, torch.device("cpu")), Look(0.2))
    torch.testing.assert_close(out, reference(q, k, v, Look(0.2)))


def test_nan_is_not_hidden():
    q = torch.randn(1, 2, 32)
    k, v = torch.randn(1, 2, 32), torch.full((1, 2, 32), torch.nan)
    keys, values = torch.zeros(BLOCK, 2, 32), torch.zeros(BLOCK, 2, 32)
    pieces = Pieces([Piece(0, 1, 1, [0])], BLOCK, torch.device("cpu"))
    assert attend_cached(q, k, v, keys, values, pieces, Look(0.2)).isnan().all()
