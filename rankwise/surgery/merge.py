"""Merging an adapter into the base weights, once in float32, and proving that the result does the same.

A merged weight is a new Parameter; the original is kept aside whole and put back by `undo`, so undoing is exact by
construction, and a weight that was tied to another (embedding and head) is untied while merged and tied again after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank
from rankwise.errors import MergeError, listing
from rankwise.surgery.kinds import Kind, Layer
from rankwise.surgery.layer import AdaptedLayer

# What one rounding of the weight may cost in a layer's output, relative to its size: a few units in the last place.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class MergeReport:
    """What merging did.

    Attributes:
        layers: how many weights were replaced.
        kept_bytes: memory held by the originals until they are put back.
        worst_error: largest relative difference of a merged layer from base + adapter, on random input.
        surviving: ‖merged - base‖ / ‖ΔW‖ over all layers; well below 1 where rounding swallowed the change.
    """

    layers: int
    kept_bytes: int
    worst_error: float
    surviving: float


class Merged:
    """One adapter merged into its layers.

    Raises:
        MergeError: lists every layer that differs from base + adapter; the originals have been put back.
    """

    @torch.no_grad()
    def __init__(self, name: str, layers: Sequence[AdaptedLayer]) -> None:
        self.name = name
        self._originals = [(layer, layer.kind.stored(layer.base)) for layer in layers]
        try:
            self.report = self._merge()
        except BaseException:  # out of memory, an interrupt, a difference: nothing stays half merged
            self.undo()
            raise

    def _merge(self) -> MergeReport:
        worst, moved, wanted, bad = 0.0, 0.0, 0.0, []
        kept = 0
        for layer, _ in self._originals:
            factors, kind = layer.of(self.name), layer.kind
            kept += kind.held(layer.base).nbytes
            old = kind.weight(layer.base)
            probe = _probe(layer.base, kind, factors, old)
            whole = [layer.part(self.name, 0, len(kind.flat(probe)))]
            before = kind.adapted(layer.base, probe, whole).double()
            target = merged_weight(old, factors)
            # B·A alone tells its norm better than a sum with W that may have swallowed it.
            wanted += (factors.delta_norm() if factors.m is None else float((target - old).norm())) ** 2
            kind.replace(layer.base, target)
            del target
            after = layer.base(probe).double()
            error = float((after - before).norm() / before.norm().clamp(min=1e-30))
            if not error <= _TOLERANCE[old.dtype]:
                bad.append(f"{layer.path}: relative error {error:.2g}, at most {_TOLERANCE[old.dtype]:.2g} expected")
            worst = max(worst, error)
            moved += float((kind.weight(layer.base).float() - old.float()).norm()) ** 2
        if bad:
            raise MergeError(f"merged weights do not do what base + adapter does; undone:\n{listing(bad)}")
        return MergeReport(len(self._originals), kept, worst, (moved / wanted) ** 0.5 if wanted else 1.0)

    def undo(self) -> None:
        """Puts the very weights back that were there."""
        for layer, original in self._originals:
            layer.kind.restore(layer.base, original)


def merged_weight(weight: Tensor, factors: LowRank) -> Tensor:
    """What W `[O, I, *K]` becomes: computed in float32 (float64 for float64), to be rounded once."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return factors.applied(weight.to(wide))


def _probe(module: Layer, kind: Kind, factors: LowRank, weight: Tensor) -> Tensor:
    """A fixed random input on which a layer and its merged form are compared."""
    generator, shape = torch.Generator().manual_seed(0), factors.shape
    if kind.lookup:
        return torch.randint(shape.inputs, (64,), generator=generator).to(weight.device)
    extents = [(k - 1) * d + 4 for k, d in zip(shape.kernel, getattr(module, "dilation", ()), strict=False)]
    if getattr(module, "padding_mode", "zeros") != "zeros":  # circular and reflect padding repeat the input itself
        extents = [extent + max(module._reversed_padding_repeated_twice) for extent in extents]
    probe = torch.randn((4 if extents else 64, shape.inputs, *extents), generator=generator)
    return probe.to(weight.device, weight.dtype)
