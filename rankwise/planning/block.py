"""One transformer block as the engine runs it: the linear layers by their place, and the widths of what flows.

Every width is in elements a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rankwise.planning.shapes import Shapes, Tensor

# Tensors of the feed-forward width that an activation keeps beside its input and output, where it is written out.
_WRITTEN_OUT = {"gelu_new": 3, "gelu_fast": 3, "quick_gelu": 1}
_INTO_ATTENTION = ("query", "key", "value", "qkv")


@dataclass(frozen=True)
class Linear:
    """A linear layer; `rank` is 0 where nothing is trained."""

    inputs: int
    outputs: int
    rank: int = 0

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Block:
    """Linear layers into and out of attention, and up and down in the feed-forward part; and what is around them.

    Attributes:
        norms: of the block's width; two of them keep the block's stream, any more keep tensors of their own.
        activation_keeps: tensors of width `ffn` that a written-out activation keeps beside its input.
        keeps_output: the activation needs what came out of it, and not what went in.
        head_norms: q and k are normalised before they are turned, and kept as they were.
    """

    hidden: int
    q: int
    kv: int
    heads: int
    ffn: int
    norms: int
    into: tuple[Linear, ...]
    out: tuple[Linear, ...]
    up: tuple[Linear, ...]
    down: tuple[Linear, ...]
    gated: bool
    rotary: bool
    activation_keeps: int
    keeps_output: bool
    head_norms: bool

    @property
    def adapted(self) -> bool:
        return any(linear.rank for linear in (*self.into, *self.out, *self.up, *self.down))


def blocks_of(shapes: Shapes, ranks: Mapping[str, int]) -> list[Block]:
    """The blocks in order; `ranks` are of the adapted layers, by path."""
    layers: dict[str, list[Tensor]] = {}
    for tensor in shapes.tensors:
        found = re.match(r"(.*?\.\d+)\.", tensor.name)
        if found is not None:
            layers.setdefault(found[1], []).append(tensor)
    return [_block(shapes, tensors, ranks) for tensors in layers.values()]


def _block(shapes: Shapes, tensors: list[Tensor], ranks: Mapping[str, int]) -> Block:
    sizes, hidden = shapes.sizes, shapes.sizes["hidden"]
    places: dict[str, list[Linear]] = {"into": [], "out": [], "up": [], "down": []}
    for tensor in tensors:
        if tensor.kind not in ("linear", "conv1d"):
            continue
        if tensor.role in _INTO_ATTENTION:
            place = "into"
        elif tensor.role == "attention":
            place = "out"
        else:
            place = "down" if tensor.outputs == hidden and tensor.inputs != hidden else "up"
        places[place].append(Linear(tensor.inputs, tensor.outputs, ranks.get(tensor.layer, 0)))
    experts = any(tensor.kind == "experts" for tensor in tensors)
    widest = max((linear.inputs for linear in places["down"]), default=0)
    ffn = sizes["chosen"] * sizes["expert_ffn"] + sizes["shared_ffn"] if experts else widest
    leaves = {tensor.layer.rsplit(".", 1)[-1] for tensor in tensors}
    return Block(
        hidden=hidden,
        q=sizes["q"],
        kv=sizes["kv"],
        heads=sizes["heads"],
        ffn=ffn,
        norms=sum(t.kind == "norm" and t.shape == (hidden,) and t.name.endswith("weight") for t in tensors),
        gated=experts or bool(leaves & {"gate_proj", "gate_up_proj", "wi_0"}),
        rotary=shapes.family.rotary,
        activation_keeps=_WRITTEN_OUT.get(sizes.activation, 0),
        keeps_output=sizes.activation == "relu",
        head_norms=bool(leaves & {"q_norm", "k_norm"}),
        **{name: tuple(found) for name, found in places.items()},
    )
