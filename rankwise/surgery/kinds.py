"""The kinds of layer that can be adapted, each as the same four facts: its shape, its weight's layout, shrink, expand.

An adapted layer computes base(x) + s · expand(shrink(x)) whatever its kind: for linear layers as one fused product
(`adapters/product.py`), for convolutions and embeddings by torch's own operators.

Shape letters: N rows (leading dimensions flattened), I inputs, O outputs, R rank, K kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.lowrank import SiteShape
from rankwise.adapters.product import low_rank_product
from rankwise.adapters.starts import Remainder
from rankwise.frozen.coded import CodedLinear
from rankwise.kernels.codes import Weight, dense
from rankwise.kernels.lowrank import Part

Layer = Any  # a module with a weight: torch types every attribute of a module as Tensor | Module


class Kind:
    """One kind of layer.  `width_dims`: trailing input dimensions that belong to one row."""

    name: str
    width_dims: int
    lookup = False

    def matches(self, module: Layer) -> bool:
        raise NotImplementedError

    def shape(self, module: Layer) -> SiteShape:
        shape = self.held(module).shape
        return SiteShape(shape[0], shape[1], tuple(shape[2:]))

    def oriented(self, weight: Tensor) -> Tensor:
        """The stored weight as `[O, I, *K]`, a view; its own inverse."""
        return weight

    def held(self, module: Layer) -> Weight:
        """The frozen weight `[O, I, *K]` as the base holds it."""
        return self.oriented(module.weight.detach())

    def weight(self, module: Layer) -> Tensor:
        """The frozen weight as a tensor, `[O, I, *K]`; made for the purpose where it is held in codes."""
        return dense(self.held(module), self.dtype(module))

    def dtype(self, module: Layer) -> torch.dtype:
        """The number format of the weight, or of what it becomes out of its codes."""
        return module.weight.dtype

    def remainder(self, module: Layer) -> Remainder | None:
        """What holding it in codes took away, if that was kept."""
        return None

    def peft_differs(self, module: Layer) -> bool:
        """Whether PEFT, given the same factors, computes something else."""
        return False

    def stored(self, module: Layer) -> Any:
        """What `replace` takes the place of, for `restore`."""
        return module.weight

    def replace(self, module: Layer, weight: Tensor) -> None:
        """Puts a weight `[O, I, *K]` in the place of the frozen one, in its number format."""
        old = module.weight
        own = self.oriented(weight).to(old.device, old.dtype).contiguous()
        module.weight = nn.Parameter(own, requires_grad=False)

    def restore(self, module: Layer, stored: Any) -> None:
        module.weight = stored

    def shrink(self, module: Layer, x: Tensor, A: Tensor) -> Tensor:
        raise NotImplementedError

    def expand(self, module: Layer, shrunk: Tensor, B: Tensor) -> Tensor:
        raise NotImplementedError

    def gained(self, module: Layer, y: Tensor, gain: Tensor) -> Tensor:
        """Gain ∘ (y - bias) + bias over the outputs of `[N, ...]`; a gain of 1 changes no bit."""
        shape = (-1, *(1 for _ in y.shape[2:])) if self.width_dims > 1 else (-1,)
        bias = getattr(module, "bias", None)
        scaled = y * gain.view(shape)
        return (scaled if bias is None else scaled + ((1 - gain) * bias).view(shape)).to(y.dtype)

    def flat(self, x: Tensor) -> Tensor:
        """The leading dimensions made one, `[N, ...]`."""
        return x.reshape(-1, *x.shape[x.dim() - self.width_dims :])

    def adapted(self, module: Layer, x: Tensor, parts: Sequence[Part], *, compiled: bool = False) -> Tensor:
        """base(x) with each part's rows passed through its adapter too; `compiled` as in `low_rank_product`."""
        y = module(x)
        pieces, done, rows = [], 0, self.flat(x)
        flat_y = y.reshape(len(rows), *y.shape[x.dim() - self.width_dims :])
        for part in parts:
            own, base = rows[part.start : part.stop], flat_y[part.start : part.stop]
            if part.keep is not None:
                own = own * part.keep / (1 - part.dropout)
            shrunk = self.shrink(module, own, part.A.to(y.dtype))
            low = base + part.scale * self.expand(module, shrunk, part.B.to(y.dtype))
            pieces += [flat_y[done : part.start], low if part.gain is None else self.gained(module, low, part.gain)]
            done = part.stop
        pieces = [piece for piece in [*pieces, flat_y[done:]] if len(piece)]
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # a lone piece keeps its memory layout
        return out.view(y.shape)


class LinearKind(Kind):
    name = "linear"
    width_dims = 1

    def matches(self, module: Layer) -> bool:
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and not _bypassed(module)

    def shrink(self, module: Layer, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    def expand(self, module: Layer, shrunk: Tensor, B: Tensor) -> Tensor:
        return F.linear(shrunk, B)

    def adapted(self, module: Layer, x: Tensor, parts: Sequence[Part], *, compiled: bool = False) -> Tensor:
        if _is_hooked(module):
            return super().adapted(module, x, parts)
        return low_rank_product(x, self.held(module), module.bias, parts, compiled=compiled)


class Conv1DKind(LinearKind):
    """transformers' Conv1D, a linear layer that stores its weight as `[I, O]`."""

    name = "conv1d-linear"

    def matches(self, module: Layer) -> bool:
        return isinstance(module, Conv1D)

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.t()


class CodedKind(LinearKind):
    """A linear layer, or a Conv1D, held in 8 or 4 bits."""

    def __init__(self, like: LinearKind) -> None:
        self.name, self.conv1d = like.name, isinstance(like, Conv1DKind)

    def matches(self, module: Layer) -> bool:
        return isinstance(module, CodedLinear) and module.conv1d == self.conv1d

    def held(self, module: Layer) -> Weight:
        return module.held

    def dtype(self, module: Layer) -> torch.dtype:
        return module.dtype

    def remainder(self, module: Layer) -> Remainder | None:
        return module.remainder

    def stored(self, module: Layer) -> Any:
        return module.replaced

    def replace(self, module: Layer, weight: Tensor) -> None:
        own = weight.to(module.codes.device, module.dtype).contiguous()
        module.replaced = nn.Parameter(own, requires_grad=False)

    def restore(self, module: Layer, stored: Any) -> None:
        module.replaced = stored


class ConvolutionKind(Kind):
    """Conv1d, Conv2d, Conv3d: A keeps the kernel, stride, padding and dilation; B is 1 × 1.

    Grouped convolutions are not sites: PEFT's factors for them cannot be merged into the grouped weight.
    """

    name = "convolution"

    def __init__(self, dimensions: int) -> None:
        self.module_type = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.product = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
        self.width_dims = dimensions + 1

    def matches(self, module: Layer) -> bool:
        plain = isinstance(module, self.module_type) and type(module).forward is self.module_type.forward
        return plain and module.groups == 1

    def peft_differs(self, module: Layer) -> bool:
        return module.padding_mode != "zeros" or any(step != 1 for step in module.dilation)

    def shrink(self, module: Layer, x: Tensor, A: Tensor) -> Tensor:
        return module._conv_forward(x, A, None)

    def expand(self, module: Layer, shrunk: Tensor, B: Tensor) -> Tensor:
        return self.product(shrunk, B)


class EmbeddingKind(Kind):
    """A lookup in `[I words, O features]`: A is `[R, I]`, B `[O, R]`."""

    name = "embedding"
    width_dims = 0
    lookup = True

    def matches(self, module: Layer) -> bool:
        own = isinstance(module, nn.Embedding)
        return own and (type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale"))

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.t()

    def shrink(self, module: Layer, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.t(), padding_idx=module.padding_idx)  # whose column learns nothing

    def expand(self, module: Layer, shrunk: Tensor, B: Tensor) -> Tensor:
        # Gemma's embedding multiplies what it looked up; the change of its weight is multiplied too.
        return F.linear(shrunk, B) * getattr(module, "embed_scale", 1.0)


KINDS: tuple[Kind, ...] = (
    LinearKind(),
    Conv1DKind(),
    CodedKind(LinearKind()),
    CodedKind(Conv1DKind()),
    ConvolutionKind(1),
    ConvolutionKind(2),
    ConvolutionKind(3),
    EmbeddingKind(),
)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer, or None for one that cannot be adapted."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def _bypassed(module: Layer) -> bool:
    """MultiheadAttention reads the weight of its out_proj without calling it: an adapter there would do nothing."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _is_hooked(module: Layer) -> bool:
    """Whether a call does more than the class says: hooks, or a forward put on the instance (offloading)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
