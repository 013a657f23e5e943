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

from rankwise.kernels.library import Factors, SiteOf, native
from rankwise.kernels.sizes import LANES

_STEP = 8  # ranks come in multiples of it
_FORMATS = (torch.bfloat16, torch.float32)


def serves_grouped(*tensors: Tensor) -> bool:
    """Whether the compiled path takes these: one format, bfloat16 or float32, in main memory."""
    alike = len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in _FORMATS
    return alike and all(x.device.type == "cpu" for x in tensors) and native() is not None


class Low:
    """One adapter's part at one layer, laid out for the products.

    Args:
        A, B: `[R, I]`, `[O, R]`.
        gain: `[O]`, or None.
        dtype: of the products.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float, gain: Tensor | None, dtype: torch.dtype) -> None:
        self.rank = -(-len(A) // _STEP) * _STEP
        more = self.rank - len(A)
        self.A = _padded(A.detach(), more, 0).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.B = _padded(B.detach().to(wide) if scale == 1 else B.detach().to(wide) * scale, 0, more).to(dtype)
        self.gain = None if gain is None else gain.detach().to(wide).contiguous()
        self.compiled = serves_grouped(self.A)
        if self.compiled:  # laid out as they are read
            pair, many = 4 // dtype.itemsize, 64 // dtype.itemsize  # numbers in a word and in a vector
            long, tall = _padded(self.A, 0, -A.shape[1] % many), _padded(self.B, -len(B) % LANES, 0)
            self.A = long.view(-1, _STEP, long.shape[1] // many, many).transpose(1, 2).contiguous()
            self.B = tall.view(torch.int32).view(-1, LANES, self.rank // pair).transpose(1, 2).contiguous()

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes + (0 if self.gain is None else self.gain.nbytes)

    def told(self) -> Factors:
        gain = None if self.gain is None else self.gain.data_ptr()
        return Factors(self.A.data_ptr(), self.B.data_ptr(), gain, self.rank)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros behind."""
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x.contiguous()


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
    """

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None, size: tuple[int, int], lows: Mapping[int, Low]
    ) -> None:
        self.weight, self.lows = weight, lows
        self.bias = (
            None if bias is None else bias.detach().to(torch.promote_types(bias.dtype, torch.float32)).contiguous()
        )
        self.outputs, self.inputs = size
        table = (Factors * (max(lows, default=-1) + 1))()
        for number, low in lows.items():
            table[number] = low.told()
        self.told = SiteOf(
            None if weight is None else weight.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.inputs,
            self.outputs,
            table if lows else None,
            len(table),
        )
        self._table = table

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
