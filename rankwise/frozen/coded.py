"""A frozen linear layer whose weight is held in 8 or 4 bits, and a model in which every one is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.presets import linear_role
from rankwise.adapters.product import low_rank_product
from rankwise.adapters.starts import Remainder, remainder_of
from rankwise.frozen.fingerprint import Sample
from rankwise.kernels.codes import Code, Coded, Weight, coded
from rankwise.kernels.sizes import Storage

_PARTS = ("codes", "scales", "groups", "offset")


class CodedLinear(nn.Module):
    """Stands where a Linear, or a Conv1D of transformers, stood.

    Args:
        weight: in codes, as it was stored.
        bias: as it was.
        dtype: number format of the dense weight, which `weight` makes anew whenever it is asked for.
        sample: of the weight before it was rounded, for the base's fingerprint.
        remainder: the largest part of what rounding took away, for a start that gives it back (LoftQ).

    Attributes:
        conv1d: the weight is stored as Conv1D has it, `[I, O]`.
        replaced: a dense weight `[O, I]` that stands in for the codes for a while (merging).
    """

    codes: Tensor
    scales: Tensor
    groups: Tensor
    offset: Tensor

    def __init__(
        self,
        weight: Coded,
        bias: Tensor | None,
        dtype: torch.dtype,
        sample: Sample,
        remainder: Remainder | None = None,
    ) -> None:
        super().__init__()
        self._like = weight
        for part in _PARTS:
            self.register_buffer(part, getattr(weight, part))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.conv1d, self.dtype, self.sample, self.remainder = weight.across, dtype, sample, remainder
        self.out_features, self.in_features = weight.shape
        self.replaced: nn.Parameter | None = None

    @property
    def code(self) -> Code:
        return self._like.code

    @property
    def held(self) -> Weight:
        """The weight `[O, I]` as it is held."""
        if self.replaced is not None:
            return self.replaced
        like = self._like
        parts = (self.codes, self.scales, self.groups, self.offset)
        return Coded(like.code, like.rows, like.columns, *parts, like.across)

    @property
    def weight(self) -> Tensor:
        """`[O, I]` (of a Conv1D `[I, O]`), dense: made for whoever asks, and not kept."""
        held = self.held
        dense = held.dense(self.dtype) if isinstance(held, Coded) else held
        return dense.t() if self.conv1d else dense

    def forward(self, x: Tensor) -> Tensor:
        return low_rank_product(x, self.held, self.bias, ())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedLinear:
        """Moves with the model; of its number format only the dense weight takes part, scales keep theirs."""
        before = {part: getattr(self, part) for part in _PARTS}
        super()._apply(fn, recurse)
        for part, tensor in before.items():
            setattr(self, part, tensor.to(getattr(self, part).device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["codes"].device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.code}"


def coded_layer(layer: Any, weight: Tensor, code: Code, remainder_rank: int = 0) -> CodedLinear:
    """`layer` (a Linear or Conv1D) with `weight`, as it would store it, in codes."""
    stored = coded(weight, code)
    meant, whole = (stored.t(), weight.t()) if isinstance(layer, Conv1D) else (stored, weight)
    residual = remainder_of(whole.float() - meant.dense(torch.float32), remainder_rank) if remainder_rank else None
    return CodedLinear(meant, layer.bias, weight.dtype, Sample.of(weight), residual)


def hold(model: nn.Module, storage: Storage, *, remainder_rank: int = 0) -> nn.Module:
    """The model itself, its linear layers held as `storage` says, one after the other.

    Embeddings, the head, norms, biases and convolutions stay as they are.

    Args:
        model: dense.
        storage: `dense` changes nothing.
        remainder_rank: keep so many of the largest directions of what rounding takes away (`init="loftq"`).
    """
    if storage != "dense":
        done: dict[int, CodedLinear] = {}  # a layer with several paths stays one
        for path in codable(model):
            layer: Any = model.get_submodule(path)
            if id(layer) not in done:
                done[id(layer)] = coded_layer(layer, layer.weight.detach(), storage, remainder_rank)
            place(model, path, done[id(layer)])
    return model


def codable(model: nn.Module) -> list[str]:
    """The paths of all linear layers that are held in codes: all but the head."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module) in (nn.Linear, Conv1D) and module is not head and linear_role(path, False) != "head"
    ]


def place(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def storage_of(model: nn.Module) -> Storage:
    """How a model's linear layers are held."""
    codes: Iterator[Storage] = (module.code for module in model.modules() if isinstance(module, CodedLinear))
    return next(codes, "dense")


def parameters_of(model: nn.Module) -> dict[str, Tensor | Sample]:
    """A model's parameters by name; of weights in codes, what the fingerprint takes of them as they were."""
    coded = {f"{path}.weight": m.sample for path, m in model.named_modules() if isinstance(m, CodedLinear)}
    return {**dict(model.named_parameters()), **coded}
