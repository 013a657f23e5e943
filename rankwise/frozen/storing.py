"""Weights put in codes while transformers reads them, one after the other: the dense model is never whole in memory.

Through the library's own registry of quantisers; no loading code of ours, and none of a model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankwise.frozen.coded import CodedLinear, codable, coded_layer, place
from rankwise.kernels.codes import Code

_NAME = "rankwise"


@register_quantization_config(_NAME)
class StorageConfig(QuantizationConfigMixin):
    """What `from_pretrained` is told: `code`, and as in `hold` the `remainder_rank`."""

    def __init__(self, code: Code = "nf4", remainder_rank: int = 0, **_: Any) -> None:
        self.quant_method = _NAME
        self.code, self.remainder_rank = code, remainder_rank


class _Storer(HfQuantizer):
    """Codes every linear layer's weight as it comes, and puts the layers in their places when all are there."""

    def __init__(self, quantization_config: StorageConfig, **named: Any) -> None:
        super().__init__(quantization_config, **named)
        self.layers: dict[str, CodedLinear | None] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self.layers = dict.fromkeys(codable(model))

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        path = param_name.removesuffix(".weight")
        return path != param_name and path in self.layers

    def get_quantize_ops(self) -> ConversionOps:
        return _Encode(self)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        done: dict[int, CodedLinear] = {}
        for path, layer in self.layers.items():
            empty = model.get_submodule(path)
            own = done.setdefault(id(empty), layer) if layer is not None else done.get(id(empty))
            if own is not None:  # a weight that the checkpoint lacks is reported by whoever loads
                own.bias = empty.bias
                place(model, path, own)
        # The rest may lie in the mapped file, which would stay in memory whole for it.
        for left in (*model.parameters(), *model.buffers()):
            left.data = left.data.clone()
        # What holds the model from here on is an ordinary model, to save and to train.
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


register_quantizer(_NAME)(_Storer)


def misfits(model: nn.Module) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Of a model that was to be put in codes: weights of another shape than their layer's, and both shapes.

    transformers compares no shapes where weights are put in codes.
    """
    found: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for path in codable(model):
        layer: Any = model.get_submodule(path)
        wanted = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
        if layer.weight.shape != wanted:
            found.append((f"{path}.weight", tuple(layer.weight.shape), wanted))
    return found


class _Encode(ConversionOps):
    """One weight into its layer; what is left for the loader to put down is empty."""

    def __init__(self, storer: _Storer) -> None:
        self.storer = storer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        left: dict[str, Tensor] = {}
        for name, given in input_dict.items():
            weight = given[0] if isinstance(given, list) else given
            path, config = name.rpartition(".")[0], self.storer.quantization_config
            layer = model.get_submodule(path)
            if weight.shape != layer.weight.shape:
                return {name: weight}  # for `misfits` to find
            self.storer.layers[path] = coded_layer(layer, weight, config.code, config.remainder_rank)
            left[name] = nn.Parameter(weight.new_empty(0), requires_grad=False)
        return left
