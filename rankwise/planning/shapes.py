"""Every tensor of a model by name and shape: from config.json by family, and from the headers where weights lie.

Shape letters: O outputs, I inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from rankwise.adapters.presets import Role, calls_itself_attention, linear_role
from rankwise.errors import ModelError, listing
from rankwise.planning.families import FAMILIES, Family
from rankwise.planning.headers import Stored
from rankwise.planning.sizes import Sizes, read_sizes

_FALLBACK = "llama"
_MOST_LAYERS = 4096  # far above any model; a config that lies must not fill the memory
_EMBEDDINGS = re.compile(r"(.*\.)?(embed\w*|\w+_embeddings?|wte|wpe|shared|relative_attention_bias)", re.I)
_COUNTED = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Tensor:
    """One parameter: its whole name, its shape as it is stored, and what it is to its layer.

    `kind` is that of families.py, or `bias`; `role` that of presets.py, where it is the weight of a layer that an
    adapter can change, else None.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    role: Role | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> str:
        """The path of the layer that holds it."""
        return self.name.rsplit(".", 1)[0]

    @property
    def outputs(self) -> int:
        return self.shape[1] if self.kind in ("conv1d", "embedding", "table") else self.shape[0]

    @property
    def inputs(self) -> int:
        return self.shape[0] if self.kind in ("conv1d", "embedding", "table") else math.prod(self.shape[1:])


@dataclass(frozen=True)
class Shapes:
    """A model as shapes.

    Attributes:
        tensors: every parameter once; of tied ones the embedding.
        source: what they were read from, for people.
        notes: what was assumed on the way, in sentences.
        stored_bytes: of the weights on disk; 0 where they are not there.
    """

    family: Family
    sizes: Sizes
    tensors: tuple[Tensor, ...]
    source: str
    notes: tuple[str, ...] = ()
    stored_bytes: int = 0

    @property
    def parameters(self) -> int:
        return sum(tensor.count for tensor in self.tensors)

    @property
    def shared(self) -> list[str]:
        """Heads whose weight is the embedding's, which is counted once, as that."""
        rows = [row.split("?") for row in self.family.rows.strip().splitlines() if row.strip().endswith("? untied")]
        return [] if self.sizes.holds("untied", 0) else [row[0].split()[0] for row in rows]

    @property
    def linear(self) -> list[Tensor]:
        """Weights of linear layers, in the model's order."""
        return [tensor for tensor in self.tensors if tensor.kind in ("linear", "conv1d")]


def shapes_of(config: Mapping[str, Any], headers: Mapping[str, Stored], where: str) -> Shapes:
    """The shapes a config describes, or the headers where there are any: these are the truth.

    Raises:
        ModelError: the config lacks a size, or describes more layers than can be.
    """
    notes: list[str] = []
    config = _text_part(config, notes)
    kind = str(config.get("model_type", ""))
    family = FAMILIES.get(kind)
    if family is None:
        notes.append(
            f"model type {kind!r} is not in the table of families: shapes are those of a Llama with these sizes"
        )
        family = FAMILIES[_FALLBACK]
    sizes = read_sizes(config, family, where)
    if sizes["layers"] > _MOST_LAYERS or sizes["decoder_layers"] > _MOST_LAYERS:
        raise ModelError(f"{where}: its config has {sizes['layers']:,} layers", hint="look at config.json")
    described = tuple(_described(family, sizes, where))
    if not headers:
        return Shapes(family, sizes, described, "config.json", tuple(notes))
    tensors = tuple(_from_headers(headers, described, sizes))
    notes += _differences(tensors, described, family is not FAMILIES.get(kind))
    size = sum(stored.size for stored in headers.values())
    return Shapes(family, sizes, tensors, "the headers of its safetensors files", tuple(notes), size)


def _text_part(config: Mapping[str, Any], notes: list[str]) -> Mapping[str, Any]:
    """The language model inside a model that also sees or hears."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return config
    notes.append(
        f"a {config.get('model_type')} holds more than its language model: without the headers of its weights the "
        "rest is not counted"
    )
    shared = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    return {**shared, **inner}


def _described(family: Family, sizes: Sizes, where: str) -> Iterator[Tensor]:
    for row in family.rows.strip().splitlines():
        row, _, condition = (part.strip() for part in row.partition("?"))
        row, _, bias = (part.strip() for part in row.partition("|"))
        path, kind, *dims = row.split()
        try:
            shape = tuple(sizes.value(dim) for dim in dims)
        except KeyError as missing:
            raise ModelError(f"{where}: its config has no {missing} size", hint="look at config.json") from None
        counts = [range(sizes[name]) for name in _COUNTED.findall(path)]
        for numbers in product(*counts):
            if not condition or sizes.holds(condition, numbers[0] if numbers else 0):
                own = _COUNTED.sub("{}", path).format(*numbers)
                yield from _layer(own, kind, shape, bool(bias) and sizes.flag(bias))


def _layer(path: str, kind: str, shape: tuple[int, ...], bias: bool) -> Iterator[Tensor]:
    if kind in ("experts", "parameter"):
        yield Tensor(path, shape, kind)
        return
    stored = shape[::-1] if kind == "conv1d" else shape
    yield Tensor(f"{path}.weight", stored, kind, _role(path, kind))
    if bias:
        yield Tensor(f"{path}.bias", shape[:1], "bias")


def _role(path: str, kind: str) -> Role | None:
    if kind in ("linear", "conv1d"):
        return linear_role(path, any(map(calls_itself_attention, path.split(".")[:-1])))
    named: dict[str, Role] = {"embedding": "embedding", "convolution": "convolution"}
    return named.get(kind)


def _from_headers(headers: Mapping[str, Stored], described: tuple[Tensor, ...], sizes: Sizes) -> Iterator[Tensor]:
    """The tensors on disk, known by their names, which may lack the model's first prefix (GPT-2's do)."""
    known = {tensor.name: tensor for tensor in described}
    ends = {tensor.name.split(".", 1)[-1]: tensor for tensor in described}
    tied = bool(sizes.config.get("tie_word_embeddings"))
    for name, stored in headers.items():
        like = known.get(name) or ends.get(name)
        if like is not None:
            yield Tensor(like.name, stored.shape, like.kind, like.role)
        elif not (tied and name == "lm_head.weight") and not _is_buffer(name):
            yield _guessed(name, stored.shape)


def _is_buffer(name: str) -> bool:
    """What old files hold beside parameters: attention masks and rotary frequencies."""
    return name.endswith(
        (".attn.bias", ".attn.masked_bias", ".attention.bias", ".rotary_emb.inv_freq", ".position_ids")
    )


def _guessed(name: str, shape: tuple[int, ...]) -> Tensor:
    path, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return Tensor(name, shape, "bias")
    if "experts" in path.split("."):
        return Tensor(name, shape, "experts")  # all in one tensor once they are loaded, and no site
    if leaf != "weight" or len(shape) != 2:
        return Tensor(name, shape, "norm" if len(shape) == 1 else "parameter")
    kind = "embedding" if _EMBEDDINGS.fullmatch(path) else "linear"
    return Tensor(name, shape, kind, _role(path, kind))


def _differences(tensors: tuple[Tensor, ...], described: tuple[Tensor, ...], guessed: bool) -> list[str]:
    """A sentence if the files hold another model than the config describes.

    Experts lie one by one on disk, under other names, and all in one tensor in memory: with them the sums are compared.
    """
    if guessed:
        return []
    sums = [sum(tensor.count for tensor in side) for side in (tensors, described)]
    if any(tensor.kind == "experts" for tensor in tensors) and sums[0] == sums[1]:
        return []
    found, wanted = ({tensor.name: tensor.shape for tensor in side} for side in (tensors, described))
    problems = [
        f"{name}: {found[name]} on disk, {wanted[name]} by config"
        for name in found.keys() & wanted.keys()
        if found[name] != wanted[name]
    ]
    problems += [f"{name}: not on disk" for name in wanted.keys() - found.keys()]
    problems += [f"{name}: not in the config" for name in found.keys() - wanted.keys()]
    if not problems:
        return []
    return [
        f"the files hold another model than config.json describes, and are believed:\n{listing(sorted(problems), 5)}"
    ]
