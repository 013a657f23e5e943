"""Weights in 8 and 4 bits, against bitsandbytes and against the definition."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from rankwise.kernels.codes import BLOCK, Coded, by_bitsandbytes, coded, dense, nf4_values, scale_values
from rankwise.kernels.library import native
from rankwise.kernels.lowrank import Part, backward_product, forward_product, serves_product

SHAPES = [(576, 1536), (96, 70), (33, 64), (7, 9), (1, 1), (300, 130)]


def weight_of(shape: tuple[int, int]) -> Tensor:
    """Rows of very different sizes, and a block of zeros."""
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).exp2()
    weight.view(-1)[:BLOCK] = 0
    return weight


def test_the_tables_are_those_of_bitsandbytes():
    assert (nf4_values() - bnb.get_4bit_type("nf4", device="cpu")).abs().max() <= 1e-7
    assert (scale_values() - bnb.create_dynamic_map()).abs().max() <= 1e-7


def test_nf4_s_values_are_quantiles_of_the_normal_distribution():
    """arXiv:2305.14314, §3: from both tails, ends chosen so that all are finite; scaled to ±1."""
    end = 0.9677083
    normal = torch.distributions.Normal(0, 1)
    below, above = (normal.icdf(torch.linspace(0.5, end, k, dtype=torch.float64)) for k in (8, 9))
    values = torch.cat([-below.flip(0), above[1:]])
    torch.testing.assert_close(nf4_values().double(), values / values.max(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_packs_and_unpacks_as_bitsandbytes_does(shape):
    weight = weight_of(shape)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    own = coded(weight, "nf4")
    assert torch.equal(own.codes, packed.flatten())
    torch.testing.assert_close(own.groups, state.state2.absmax, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(own.offset, state.offset, rtol=1e-6, atol=1e-30)
    # Where a scale lies between two of the 256 values, bitsandbytes takes one and we may take the other.
    if len(own.scales) > 1:  # a lone scale is its own mean, and nothing is left to be coded
        apart = (own.scales.int() - state.absmax.flatten().int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.01
    theirs = Coded("nf4", *shape, packed.flatten(), state.absmax.flatten(), state.state2.absmax, state.offset)
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        want = bnb.dequantize_4bit(packed, state)
        torch.testing.assert_close(theirs.dense(dtype), want, rtol=0, atol=1e-7 * float(weight.abs().max()))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitsandbytes_kernel_gives_the_same_weights(dtype, across):
    """It is taken on GPUs; on a processor it can at least be asked."""
    own = coded(weight_of((96, 70)), "nf4")
    own = own.t() if across else own
    torch.testing.assert_close(by_bitsandbytes(own, dtype), own.dense(dtype), rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_off_by_half_a_step_of_its_block_at_most(shape):
    weight = weight_of(shape)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    steps = (flat.abs().amax(1, keepdim=True) / 127).expand(flat.shape).reshape(-1)[: weight.numel()].view(shape)
    error = (coded(weight, "int8").dense(torch.float32) - weight).abs()
    assert (error <= 0.5001 * steps).all()


@pytest.mark.parametrize(("code", "bits"), [("int8", 8.5), ("nf4", 4.127)])
def test_what_it_takes_and_what_it_costs(code, bits):
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    own = coded(weight, code)
    assert own.nbytes * 8 / weight.numel() == pytest.approx(bits, abs=0.001)
    lost = float((own.dense(torch.float32) - weight).square().mean())
    assert lost < {"int8": 5e-5, "nf4": 9e-3}[code]  # methods: 0.00845 for NF4 on normal numbers


@pytest.mark.parametrize("code", ["int8", "nf4"])
def test_large_weights_are_coded_in_pieces_without_a_seam(code, monkeypatch):
    weight = weight_of((300, 130))
    whole = coded(weight, code)
    monkeypatch.setattr("rankwise.kernels.codes._AT_ONCE", 5 * BLOCK)
    pieces = coded(weight, code)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scales, whole.scales)
    assert torch.equal(pieces.dense(torch.bfloat16), whole.dense(torch.bfloat16))


@pytest.mark.skipif(native() is None, reason="no compiled kernels here")
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("code", ["int8", "nf4"])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 70), (34, 62), (64, 192), (130, 128)])
def test_the_compiled_product_sees_the_very_weights(outputs, inputs, code, across):
    generator = torch.Generator().manual_seed(inputs)
    stored = coded(weight_of((inputs, outputs) if across else (outputs, inputs)), code)
    own = stored.t() if across else stored
    plain = dense(own, torch.bfloat16).contiguous()
    assert own.shape == plain.shape == (outputs, inputs)
    x, grad = (torch.randn(70, n, generator=generator).bfloat16() for n in (inputs, outputs))
    part = Part(3, 60, torch.randn(5, inputs), torch.randn(outputs, 5), 2.0)
    found = []
    for weight in (own, plain):
        assert serves_product(x, weight, None, [part])
        y, shrinks = forward_product(x, weight, None, [part])
        dx, ((dA, dB, _),) = backward_product(grad, x, None, weight, None, [part], shrinks, for_x=True)
        found.append((y, dx, dA, dB))
    assert all(map(torch.equal, *found))
    assert serves_product(x[:1], own, None, [])
    assert torch.equal(forward_product(x[:1], own, None, [])[0], forward_product(x[:1], plain, None, [])[0])
