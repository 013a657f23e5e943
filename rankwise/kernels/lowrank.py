"""The product of an adapted linear layer in one compiled call each way: `adapters/product.py` says what it computes.

Shape letters: N rows, I inputs, O outputs, R rank, P the rank rounded up to whole vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.kernels.codes import Weight, nf4_values, scale_values
from rankwise.kernels.library import LowRankPart, Matrix, TensorRows, product, serves
from rankwise.kernels.sizes import LANES

_LEAST_ROWS = 32  # below, laying out the weight costs more than it saves
_CODES = {"int8": 1, "nf4": 2}  # lowrank.c; 0 is none


@dataclass(frozen=True)
class Part:
    """Rows `start` up to `stop` go through one adapter; `keep` is its dropout mask over them, or None."""

    start: int
    stop: int
    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0
    keep: Tensor | None = None
    gain: Tensor | None = None


def serves_product(x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[Part]) -> bool:
    """Whether the compiled product takes these: bfloat16 with float32 factors, of even width, enough rows to pay.

    A weight in codes would have to be made whole for any other product, so there a single row is enough.
    """
    constants = [] if bias is None else [bias]
    enough = 1
    if isinstance(weight, Tensor):
        constants.append(weight)
        enough = _LEAST_ROWS
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            return False
    factors = [f for part in parts for f in (part.A, part.B, part.gain) if f is not None]
    return (
        x.numel() >= enough * x.shape[-1]
        and weight.shape[0] % 2 == weight.shape[1] % 2 == 0
        and serves(x, *constants)
        and all(f.dtype == torch.float32 and f.device.type == "cpu" for f in factors)
    )


def _matrix(weight: Weight) -> Matrix:
    """The C side's view of a weight that lives at least as long."""
    if isinstance(weight, Tensor):
        stored = weight if weight.is_contiguous() else weight.t()
        return Matrix(weight.data_ptr(), *stored.shape, stored is not weight, 0)
    told = Matrix(weight.codes.data_ptr(), weight.rows, weight.columns, weight.across, _CODES[weight.code])
    told.scales, told.groups, told.offset = (p.data_ptr() for p in (weight.scales, weight.groups, weight.offset))
    told.scale_values, told.values = scale_values().data_ptr(), nf4_values().data_ptr()
    return told


def forward_product(
    x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[Part]
) -> tuple[Tensor, list[Tensor]]:
    """Y `[N, O]` of x `[N, I]`, and the shrink `[n, P]` of every part."""
    x = _in_rows(x)
    y = x.new_empty(len(x), len(weight))
    shrinks = [x.new_empty(s.stop - s.start, -(-len(s.A) // LANES) * LANES) for s in parts]
    call = _Call(weight, bias, parts, shrinks, len(x))
    call.check(
        product("lowrank_forward")(
            TensorRows.of(x), call.weight, call.bias, call.parts, call.count, y.data_ptr(), *call.sizes
        )
    )
    return y, shrinks


def backward_product(
    grad: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    parts: Sequence[Part],
    shrinks: Sequence[Tensor],
    *,
    for_x: bool,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor, Tensor | None]]]:
    """Dx `[N, I]`, if it is asked for, and of every part the gradients of A, B and what its gain was applied to.

    The last is Σ grad ∘ (y - bias), `[O]`: the gain's own gradient times the gain.  `x` may be None where there is no
    part, `y` where none has a gain.
    """
    grad, x = _in_rows(grad), None if x is None else _in_rows(x)
    dx = grad.new_empty(len(grad), weight.shape[1]) if for_x else None
    found = [
        (torch.empty_like(s.A), torch.empty_like(s.B), None if s.gain is None else torch.empty_like(s.gain))
        for s in parts
    ]
    call = _Call(weight, bias, parts, shrinks, len(grad), found)
    call.check(
        product("lowrank_backward")(
            TensorRows.of(grad),
            TensorRows() if x is None else TensorRows.of(x),
            None if y is None else y.data_ptr(),
            call.weight,
            call.bias,
            call.parts,
            call.count,
            None if dx is None else dx.data_ptr(),
            *call.sizes,
        )
    )
    return dx, found


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


class _Call:
    """What both directions tell the C side, and the tensors that must live until it returns."""

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None,
        parts: Sequence[Part],
        shrinks: Sequence[Tensor],
        rows: int,
        found: Sequence[tuple[Tensor | None, ...]] = (),
    ) -> None:
        self.sizes = (rows, weight.shape[1], weight.shape[0])
        self.weight = _matrix(weight)
        self._held: list[Tensor] = []
        self.bias = self._address(None if bias is None else bias.detach().float())
        places: list[Sequence[Tensor | None]] = list(found) or [(None, None, None)] * len(parts)
        told = list(self._told(parts, shrinks, places, rows))
        self.count = len(told)
        self.parts = (LowRankPart * self.count)(*told)

    def _told(
        self,
        parts: Sequence[Part],
        shrinks: Sequence[Tensor],
        places: Sequence[Sequence[Tensor | None]],
        rows: int,
    ) -> Iterator[LowRankPart]:
        """Every row in exactly one."""
        done = 0
        for part, shrink, own in zip(parts, shrinks, places, strict=True):
            if done < part.start:
                yield LowRankPart(start=done, stop=part.start)
            done = part.stop
            A, B, gain, keep = map(self._address, (part.A, part.B, part.gain, part.keep))
            yield LowRankPart(
                start=part.start,
                stop=done,
                rank=len(part.A),
                A=A,
                B=B,
                gain=gain,
                keep=keep,
                shrink=shrink.data_ptr(),
                grad_A=self._address(own[0]),
                grad_B=self._address(own[1]),
                grad_gain=self._address(own[2]),
                scale=part.scale,
                rest=1 / (1 - part.dropout) if part.keep is not None else 1.0,
            )
        if done < rows:
            yield LowRankPart(start=done, stop=rows)

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        dense = tensor.detach().contiguous()
        self._held.append(dense)
        return dense.data_ptr()

    def check(self, failed: int) -> None:
        if failed:
            rows, inputs, outputs = self.sizes
            raise torch.OutOfMemoryError(f"no memory for a product of {rows} rows, {inputs} by {outputs}")
