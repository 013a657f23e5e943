"""An adapter on its way from one format to another, and what a format may have to know of its model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.lowrank import LowRank, SiteShape
from rankwise.adapters.spec import LoraSpec, exactly
from rankwise.errors import AdapterFileError, listing

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """What a model says of one of its layers: its kind by name (`surgery/kinds.py`) and its weight's shape."""

    kind: str
    shape: SiteShape


@dataclass(frozen=True)
class Outline:
    """A model without its weights.

    Attributes:
        name: as it was given.
        family: its `model_type`, such as `llama`; empty for models that have none.
        settings: its config.
        layers: path → layer, for those that can be adapted.
        tied: whether the head is the embedding.
    """

    name: str
    family: str
    settings: Mapping[str, Any]
    layers: Mapping[str, Layer]
    tied: bool = False


@dataclass(frozen=True)
class Terms:
    """What a person said beside the file; each format looks at its own.

    Attributes:
        outline: of the base, where one is known.
        component: the model of a diffusion pipeline, such as `unet`.
        alpha: of formats that do not store it.
        enable_lora: loralib's: which of the matrices of a merged layer have factors.
        dtype: of the tensors that are written.
    """

    outline: Outline | None = None
    component: str = ""
    alpha: float | None = None
    enable_lora: tuple[bool, ...] = ()
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Portable:
    """An adapter and what its tensors do not say.

    Attributes:
        lookups: paths of embeddings.
        transposed: whether layers store their weight as `[I, O]`, as transformers' Conv1D does.
        base: name or path of the base, as the file says; empty where it does not.
        task: PEFT's name for what it is for.
        component: the model of a pipeline that it belongs to, where that is known.
        notes: what was taken for granted in reading it, in sentences.
    """

    adapter: Adapter
    lookups: frozenset[str] = frozenset()
    transposed: bool = False
    base: str = ""
    task: str | None = None
    component: str = ""
    notes: tuple[str, ...] = field(default=())

    def known_on(self, outline: Outline | None) -> Portable:
        """The same, with the kinds of its layers as the model has them.

        Raises:
            AdapterFileError: lists every layer that the model does not have, or has in another shape.
        """
        if outline is None:
            return self
        problems = []
        for path, factors in self.adapter.sites.items():
            layer = outline.layers.get(path)
            if layer is None:
                problems.append(f"{path}: no such layer, or one that cannot be adapted")
            elif layer.shape != factors.shape:
                problems.append(f"{path}: made for a weight {_size(factors.shape)}, there it is {_size(layer.shape)}")
        if problems:
            raise AdapterFileError(
                f"the adapter does not fit {outline.name}:\n{listing(problems)}",
                hint="was it made for another model, or for another size of it?",
            )
        kinds = {path: outline.layers[path].kind for path in self.adapter.sites}
        lookups = frozenset(path for path, kind in kinds.items() if kind == "embedding")
        return replace(self, lookups=lookups, transposed="conv1d-linear" in kinds.values(), base=outline.name)

    def kinds(self) -> dict[str, str]:
        """The kind of each layer, as far as formats tell them apart."""
        linear = "conv1d-linear" if self.transposed else "linear"
        return {
            path: "embedding" if path in self.lookups else "convolution" if factors.shape.kernel else linear
            for path, factors in self.adapter.sites.items()
        }

    def cast(self, dtype: torch.dtype) -> Portable:
        """With its factors, magnitudes and whole layers in a number format."""
        sites = {
            path: LowRank(
                own.A.detach().to(dtype),
                own.B.detach().to(dtype),
                own.scale,
                own.dropout,
                m=None if own.m is None else own.m.detach().to(dtype),
            )
            for path, own in self.adapter.sites.items()
        }
        modules = {
            path: {name: tensor.to(dtype) for name, tensor in parameters.items()}
            for path, parameters in self.adapter.modules.items()
        }
        return replace(self, adapter=replace(self.adapter, sites=sites, modules=modules))


def from_factors(
    sites: Mapping[str, LowRank], modules: Mapping[str, Mapping[str, torch.Tensor]] | None = None
) -> Adapter:
    """An adapter of which nothing but its tensors and factors s is known; the spec means exactly these layers."""
    ranks = {path: factors.rank for path, factors in sites.items()}
    scales = {path: factors.scale for path, factors in sites.items()}
    rank, scale = (Counter(found.values()).most_common(1)[0][0] if found else 1 for found in (ranks, scales))
    spec = LoraSpec(
        rank=int(rank),
        alpha=float(scale) or 1.0,
        targets=tuple(sites) or ".*",
        form="dora" if any(factors.m is not None for factors in sites.values()) else "lora",
        scaling="alpha",
        rank_pattern={exactly(path): own for path, own in ranks.items() if own != rank},
        alpha_pattern={exactly(path): own for path, own in scales.items() if own != scale and own > 0},
        modules_to_save=tuple(modules or ()),
    )
    return Adapter(spec, sites, modules or {})


@torch.no_grad()
def folded(factors: LowRank, scale: float = 1.0) -> LowRank:
    """The same change with another factor s: what is left of it is in B."""
    B = factors.B.detach() * (factors.scale / scale)
    return LowRank(factors.A.detach(), B, scale, factors.dropout, m=None if factors.m is None else factors.m.detach())


def obstacles(portable: Portable, *, dora: bool, convolutions: bool, lookups: bool) -> list[str]:
    """What of an adapter has no place in a format that holds A and B, and of the rest what is said here."""
    adapter = portable.adapter
    found = []
    magnitudes = [path for path, factors in adapter.sites.items() if factors.m is not None]
    if magnitudes and not dora:
        found.append(f"form dora: the magnitudes of {len(magnitudes)} layers, {magnitudes[0]} first")
    found += [f"{path}: a convolution" for path, own in adapter.sites.items() if own.shape.kernel and not convolutions]
    found += [f"{path}: an embedding" for path in sorted(portable.lookups) if not lookups]
    found += [f"{path}: a layer trained whole" for path in adapter.modules]
    return found + [f"{path}: rows of {len(rows.tokens)} tokens" for path, rows in adapter.tokens.items()]


def refuse(name: str, problems: Iterable[str], hint: str = "") -> None:
    """Everything of an adapter that a format cannot hold, at once.

    Raises:
        AdapterFileError: there is something.
    """
    listed = list(problems)
    if listed:
        raise AdapterFileError(
            f"{name} has no place for {len(listed)} part{'s' * (len(listed) > 1)} of this adapter:\n{listing(listed)}",
            hint=hint or "merge it into its base (rankwise merge) and convert the merged model",
        )


def paired(
    path: Path, found: Mapping[str, Mapping[str, torch.Tensor]], scales: Mapping[str, float]
) -> dict[str, LowRank]:
    """Factors of every layer out of its parts `A`, `B` and, of form dora, `m`.

    Raises:
        AdapterFileError: lists every layer with a part missing, or of two ranks.
    """
    problems, sites = [], {}
    for name, parts in found.items():
        A, B = parts.get("A"), parts.get("B")
        if A is None or B is None:
            problems.append(f"{name}: has {' and '.join(sorted(parts))} only")
        elif A.dim() < 2 or A.dim() != B.dim() or len(A) != B.shape[1]:
            problems.append(f"{name}: A {tuple(A.shape)} and B {tuple(B.shape)} are not two factors of one rank")
        else:
            m = parts["m"].float().reshape(-1) if "m" in parts else None
            sites[name] = LowRank(A.float(), B.float(), scales[name], m=m)
    if problems:
        raise AdapterFileError(f"{path}: {len(problems)} layers cannot be understood:\n{listing(problems)}")
    if not sites:
        raise AdapterFileError(f"{path}: holds no factors of any layer")
    return sites


def _size(shape: SiteShape) -> str:
    return " × ".join(map(str, (shape.outputs, shape.inputs, *shape.kernel)))
