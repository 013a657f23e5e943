"""Weights in 8 or 4 bits: blocks of 64 neighbours share a scale, the largest of their sizes.

int8   w ≈ scale · code / 127, codes whole numbers; scales in float32: 8.5 bits a weight.
nf4    w ≈ scale · NF4[code], codes the 16 quantiles of a normal distribution (QLoRA, arXiv:2305.14314, §3, appendix E);
       scales in 8 bits themselves (double quantisation): 4.127 bits a weight.  Tables, blocks and packing are those of
       bitsandbytes, so that either can read the other's.

Shape letters: W [rows, columns] as it is stored; n weights, K blocks, G groups of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from rankwise.kernels.sizes import BLOCK, GROUP

Code = Literal["int8", "nf4"]
_AT_ONCE = 1 << 22  # weights: temporaries of 16 bytes each stay small beside a layer


# arXiv:2305.14314, appendix E: quantiles of the normal distribution, seven below 0, zero, eight above, scaled to ±1.
# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@cache
def nf4_values() -> Tensor:
    """The 16 values, float32, ascending."""
    return torch.tensor(_NF4)


@cache
def scale_values() -> Tensor:
    """The 256 values of a scale, float32, ascending: dynamic tree quantisation (arXiv:2110.02861, §1.3).

    0, 1, and ± 10^(i-6) times the middles of 2^i equal parts of [0.1, 1], for i from 0 to 6.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        for middle in ((edges[:-1] + edges[1:]) / 2).tolist():
            values += [middle * 10 ** (i - 6), -middle * 10 ** (i - 6)]
    return torch.tensor(sorted(values), dtype=torch.float64).float()


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight in codes.

    Attributes:
        code: which.
        rows, columns: of W as it is stored.
        across: what is meant is the transpose of what is stored.
        codes: int8 `[n]`; or uint8 `[⌈n / 2⌉]`, the first of two weights in the upper four bits.
        scales: float32 `[K]`; or uint8 `[K]`, numbers of `scale_values`.
        groups: float32 `[G]`, nf4 only: what the values of a group's scales are multiplied by.
        offset: float32, nf4 only: what is added to them.
    """

    code: Code
    rows: int
    columns: int
    codes: Tensor
    scales: Tensor
    groups: Tensor
    offset: Tensor
    across: bool = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.columns, self.rows) if self.across else (self.rows, self.columns))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __len__(self) -> int:
        return self.shape[0]

    def t(self) -> Coded:
        return replace(self, across=not self.across)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.groups, self.offset))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W in a number format of its own: computed in float32, rounded once."""
        if self.device.type == "cuda" and self.code == "nf4" and find_spec("bitsandbytes") is not None:
            return by_bitsandbytes(self, dtype)
        count = self.rows * self.columns
        scales = self._whole_scales()
        if self.code == "int8":
            pieces = [self._int8(scales, at, dtype) for at in range(0, len(scales), _AT_ONCE // BLOCK)]
        else:
            pieces = [self._nf4(scales, at, dtype) for at in range(0, len(scales), _AT_ONCE // BLOCK)]
        flat = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).reshape(-1)
        weight = flat[:count].view(self.rows, self.columns)
        return weight.t() if self.across else weight

    def _whole_scales(self) -> Tensor:
        if self.code == "int8":
            return self.scales
        values = scale_values().to(self.device)[self.scales.int()]
        return torch.addcmul(self.offset, values, self.groups.repeat_interleave(GROUP)[: len(values)])

    def _int8(self, scales: Tensor, at: int, dtype: torch.dtype) -> Tensor:
        own = scales[at : at + _AT_ONCE // BLOCK]
        codes = _whole_blocks(self.codes[at * BLOCK : (at + len(own)) * BLOCK], len(own), BLOCK)
        return (codes.float() * (own / 127)[:, None]).to(dtype)

    def _nf4(self, scales: Tensor, at: int, dtype: torch.dtype) -> Tensor:
        own, half = scales[at : at + _AT_ONCE // BLOCK], BLOCK // 2
        codes = _whole_blocks(self.codes[at * half : (at + len(own)) * half], len(own), half)
        pairs = torch.cartesian_prod(nf4_values(), nf4_values()).to(self.device)  # what a byte stands for
        return (pairs[codes.int()].flatten(1) * own[:, None]).to(dtype)


def by_bitsandbytes(weight: Coded, dtype: torch.dtype) -> Tensor:
    """`Coded.dense` of nf4 by bitsandbytes' kernel, which makes no table lookups out of tensors on a GPU."""
    from bitsandbytes import functional

    values, scales = (table.to(weight.device) for table in (nf4_values(), scale_values()))
    outer = functional.QuantState(absmax=weight.groups, code=scales, blocksize=GROUP, dtype=torch.float32)
    shape = torch.Size((weight.rows, weight.columns))
    state = functional.QuantState(
        absmax=weight.scales,
        shape=shape,
        code=values,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=weight.offset,
        state2=outer,
    )
    whole = functional.dequantize_4bit(weight.codes.view(-1, 1), state)
    return whole.t() if weight.across else whole


def _whole_blocks(codes: Tensor, blocks: int, each: int) -> Tensor:
    """`[blocks, each]`; the last block may be ragged."""
    missing = blocks * each - len(codes)
    return torch.cat([codes, codes.new_zeros(missing)]).view(blocks, each) if missing else codes.view(blocks, each)


Weight = Tensor | Coded


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as a tensor of a number format; one that is none in codes is left as it is."""
    return weight.dense(dtype) if isinstance(weight, Coded) else weight


@torch.no_grad()
def coded(weight: Tensor, code: Code) -> Coded:
    """A matrix in codes, on its own device."""
    flat = weight.detach().reshape(-1)
    found = [_coded_piece(flat[at : at + _AT_ONCE], code) for at in range(0, len(flat), _AT_ONCE)]
    codes, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    none = scales.new_zeros(0)
    if code == "int8":
        return Coded(code, len(weight), weight.shape[1], codes[: len(flat)], scales, none, scales.new_zeros(()))
    offset = scales.mean()
    centred = scales - offset
    groups = _blocks(centred, GROUP).abs().amax(1)
    relative = _blocks(centred, GROUP) / groups.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    numbers = _nearest(relative.reshape(-1)[: len(scales)], scale_values()).to(torch.uint8)
    return Coded(code, len(weight), weight.shape[1], codes[: (len(flat) + 1) // 2], numbers, groups, offset)


def _coded_piece(flat: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    blocks = _blocks(flat.float(), BLOCK)
    scales = blocks.abs().amax(1)
    relative = blocks / torch.where(scales == 0, 1.0, scales)[:, None]
    if code == "int8":
        return (relative * 127).round_().to(torch.int8).reshape(-1), scales
    numbers = _nearest(relative, nf4_values()).to(torch.uint8).reshape(-1)
    return numbers[0::2] << 4 | numbers[1::2], scales


def _blocks(flat: Tensor, each: int) -> Tensor:
    """`[⌈n / each⌉, each]`, zeros at the end."""
    return _whole_blocks(flat, -(-len(flat) // each), each)


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """Which of ascending `values` is nearest to each element."""
    middles = ((values[:-1].double() + values[1:].double()) / 2).float().to(x.device)
    return torch.bucketize(x, middles, out_int32=True)
