"""Products of a step of serving: every row through one base, and each through the factors of its own adapter.

    y[n] = gain ∘ (x[n]·Wᵀ + s·(x[n]·Aᵀ)·Bᵀ) + bias        A, B, s, gain: of the adapter of row n, or none

Shape letters: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.kernels.library import Factors, Plain, SiteOf, native
from rankwise.kernels.sizes import LANES

_STEP = 8  # ranks come in multiples of it
_FORMATS = (torch.bfloat16, torch.float32)


def serves_grouped(*tensors: Tensor) -> bool:
    """Whether the compiled path takes these: one format, bfloat16 or float32, in main memory."""
    alike = len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in _FORMATS
    return alike and all(x.device.type == "cpu" for x in tensors) and native() is not None


@dataclass(frozen=True)
class Low:
    """One adapter's part at one layer, laid out for the products by `laid_out`.

    Attributes:
        A, B: compiled, in the order in which serving.c reads them; else `[R, I]`, `[O, R]`, B times the scale.
        gain: `[O]`, or None.
        rank: R, without the zeros behind.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None
    rank: int

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes + (0 if self.gain is None else self.gain.nbytes)

    def told(self) -> Factors:
        gain = None if self.gain is None else self.gain.data_ptr()
        return Factors(self.A.data_ptr(), self.B.data_ptr(), gain, _up(self.rank, _STEP))


@torch.no_grad()
def laid_out(parts: Sequence[tuple[Tensor, Tensor, float, Tensor | None]], dtype: torch.dtype) -> list[Low]:
    """An adapter's parts, each of A `[R, I]`, B `[O, R]`, scale and gain `[O]`, for products of a `dtype`.

    Compiled, all of them are one call and lie in one piece of memory: there are hundreds of them, and small ones.
    """
    if not parts:
        return []
    wide = torch.promote_types(dtype, torch.float32)
    compiled = dtype in _FORMATS and parts[0][0].device.type == "cpu" and native() is not None
    gains = [None if gain is None else gain.to(wide).contiguous() for *_, gain in parts]
    plain = [(A.to(wide).contiguous(), B.to(wide).contiguous(), scale) for A, B, scale, _ in parts]
    made = (
        _compiled(plain, dtype)
        if compiled
        else [(A.to(dtype, copy=True), (B * scale).to(dtype)) for A, B, scale in plain]
    )
    ranks = [len(A) for A, *_ in parts]
    return [Low(A, B, gain, rank) for (A, B), gain, rank in zip(made, gains, ranks, strict=True)]


def _compiled(parts: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """In the order in which serving.c reads them, with zeros behind (`Factors`)."""
    across = 64 // dtype.itemsize  # numbers in a vector
    sizes = []
    for A, B, _ in parts:
        rank = _up(len(A), _STEP)
        sizes += [rank * _up(A.shape[1], across), rank * _up(len(B), LANES)]
    rooms = torch.empty(sum(sizes), dtype=dtype).split(sizes)
    made = list(zip(rooms[::2], rooms[1::2], strict=True))
    told = [
        Plain(*(x.data_ptr() for x in (A, B, to_A, to_B)), *A.shape, len(B), scale)
        for (A, B, scale), (to_A, to_B) in zip(parts, made, strict=True)
    ]
    native().lay_out((Plain * len(told))(*told), len(told), dtype == torch.float32)  # type: ignore[union-attr]
    return made


def _up(size: int, step: int) -> int:
    return size + -size % step


@dataclass(frozen=True)
class Adapters:
    """The adapter of each row of a step, by number; -1 for none."""

    of_rows: Sequence[int]
    told: ctypes.Array[ctypes.c_int64]

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int]]) -> Adapters:
        """From runs of (adapter, rows)."""
        rows = [number for number, count in runs for _ in range(count)]
        return cls(rows, (ctypes.c_int64 * len(rows))(*rows))

    def runs(self) -> list[tuple[int, int, int]]:
        """`(adapter, start, stop)`."""
        found, start = [], 0
        for number, group in groupby(self.of_rows):
            stop = start + len(list(group))
            found.append((number, start, stop))
            start = stop
        return found


class Grouped:
    """A layer and what adapters, by number, add to it.

    Args:
        weight: `[O, I]`, rows that lie close, or None: the base's product is made elsewhere.
        bias: `[O]` or None.
        size: outputs and inputs.
        room: for adapters by the numbers 0 to `room` - 1, that come and go while others know where this lies.
    """

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        size: tuple[int, int],
        lows: Mapping[int, Low],
        room: int = 0,
    ) -> None:
        self.weight, self.lows = weight, dict(lows)
        self.bias = (
            None if bias is None else bias.detach().to(torch.promote_types(bias.dtype, torch.float32)).contiguous()
        )
        self.outputs, self.inputs = size
        table = (Factors * max(room, max(lows, default=-1) + 1))()
        for number, low in lows.items():
            table[number] = low.told()
        self.told = SiteOf(
            None if weight is None else weight.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.inputs,
            self.outputs,
            table if len(table) else None,
            len(table),
        )
        self._table = table

    def take(self, number: int, low: Low) -> None:
        """From now on adapter `number`, for which there is room, adds this."""
        self.lows[number], self._table[number] = low, low.told()

    def drop(self, number: int) -> None:
        """From now on it adds nothing."""
        if self.lows.pop(number, None) is not None:
            self._table[number] = Factors()

    def product(self, x: Tensor, adapters: Adapters) -> Tensor:
        """`[N, O]` of x `[N, I]`, rows close."""
        assert self.weight is not None
        if serves_grouped(x, self.weight):
            y = x.new_empty(len(x), self.outputs)
            self._compiled(x, y, adapters, self.told)
            return y
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.added(x, F.linear(x, self.weight, bias), adapters)

    def added(self, x: Tensor, y: Tensor, adapters: Adapters) -> Tensor:
        """`y`, the base's product with its bias, `[N, O]`, with what the adapters add, in place."""
        if not self.lows:
            return y
        if serves_grouped(x, y):
            bare = SiteOf(None, self.told.bias, self.inputs, self.outputs, self.told.factors, self.told.count)
            self._compiled(x, y, adapters, bare)
            return y
        for number, start, stop in adapters.runs():
            low = self.lows.get(number)
            if low is None:
                continue
            own = y[start:stop]
            own.addmm_(x[start:stop] @ low.A.t(), low.B.t())
            if low.gain is not None:
                bias = 0 if self.bias is None else self.bias
                own.copy_((own.to(low.gain.dtype) - bias) * low.gain + bias)
        return y

    def _compiled(self, x: Tensor, y: Tensor, adapters: Adapters, site: SiteOf) -> None:
        wide = x.dtype == torch.float32
        failed = native().grouped_product(  # type: ignore[union-attr]
            ctypes.byref(site), adapters.told, x.data_ptr(), y.data_ptr(), len(x), wide
        )
        if failed:
            raise torch.OutOfMemoryError(f"no memory for a product of {len(x)} rows, {self.inputs} by {self.outputs}")
