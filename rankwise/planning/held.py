"""What is held from the first step to the last: weights, adapters, gradients, and what the optimiser remembers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rankwise.adapters.presets import TARGET_ROLES
from rankwise.kernels.sizes import BLOCK, GROUP, Storage
from rankwise.planning.passes import Form
from rankwise.planning.shapes import Shapes, Tensor

BYTES_A_WEIGHT: dict[Storage, float] = {
    "int8": 1 + 4 / BLOCK,
    "nf4": 0.5 + 1 / BLOCK + 4 / (BLOCK * GROUP),
}
_MASTER = _GRADIENT = 4  # bytes: float32, whatever the base is held in
_MOMENTS = 2 * 4  # AdamW's two
_IMPORTANCE = 2 * 4  # AdaLoRA's, a parameter: its average and its uncertainty (arXiv:2303.10512 §3.2)
_NORMS = 4  # DoRA's, float32: ‖W‖² and the last norms of each output, and the factors that these are of


@dataclass(frozen=True)
class Held:
    """Bytes, and how many parameters are trained."""

    weights: int
    adapters: int
    gradients: int
    optimiser: int
    trained: int


def weight_bytes(shapes: Shapes, storage: Storage, width: int) -> int:
    """The frozen base: linear layers of the blocks as `storage` has them, the rest in `width` bytes a number."""
    if storage == "dense":
        return shapes.parameters * width
    quantised = sum(tensor.count for tensor in shapes.tensors if is_quantised(tensor))
    return round(quantised * BYTES_A_WEIGHT[storage]) + (shapes.parameters - quantised) * width


def is_quantised(tensor: Tensor) -> bool:
    """Every linear layer but the head; experts, embeddings, norms and biases stay as they are."""
    return tensor.role in TARGET_ROLES["all-linear"]


def held_of(shapes: Shapes, ranks: Mapping[str, int], form: Form, storage: Storage, width: int) -> Held:
    """All that stays, for adapters of these ranks by path, or for full fine-tuning."""
    weights = weight_bytes(shapes, storage, width)
    if form == "full":
        count = shapes.parameters
        masters = 0 if width == _MASTER else count * _MASTER
        return Held(weights, masters, count * _GRADIENT, count * _MOMENTS, count)
    sites = sites_of(shapes, ranks)
    count = sum(_factors(form, sites, ranks))
    kept = count * _MOMENTS + (count * _IMPORTANCE if form == "adalora" else 0)
    norms = _NORMS * sum(_factors("lora", sites, ranks)) + 2 * _NORMS * sum(site.outputs for site in sites)
    return Held(weights, count * _MASTER + (norms if form == "dora" else 0), count * _GRADIENT, kept, count)


def held_whole(count: int) -> Held:
    """Of parameters that an adapter trains whole, beside the base's own: a head, rows of tokens."""
    return Held(0, count * _MASTER, count * _GRADIENT, count * _MOMENTS, count)


def sites_of(shapes: Shapes, ranks: Mapping[str, int]) -> list[Tensor]:
    return [tensor for tensor in shapes.tensors if tensor.layer in ranks and tensor.role is not None]


def _factors(form: Form, sites: Iterable[Tensor], ranks: Mapping[str, int]) -> Iterable[int]:
    for site in sites:
        rank = ranks[site.layer]
        own = {"dora": site.outputs, "adalora": rank}.get(form, 0)
        yield rank * (site.inputs + site.outputs) + own
