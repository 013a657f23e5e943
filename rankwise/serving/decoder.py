"""A model's layers as `kernels/decoder.py` has them, where they are of that form; whether they are, a probe decides.

Names say which parts a layer has; that it does with them what the kernel does is proved by what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rankwise.kernels.decoder import Decoder, Layer, Shape
from rankwise.kernels.grouped import Grouped, serves_grouped
from rankwise.serving.attention import Store
from rankwise.serving.rack import Rack

_LINEARS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}


class DecoderLayers:
    """The layers of a model as one; within `standing` they are.

    Args:
        offset: of the norms.
    """

    def __init__(self, model: Any, rack: Rack, store: Store, offset: float) -> None:
        self.inner, self.rack, self.store = model.base_model, rack, store
        layers = [self._layer(layer, i) for i, layer in enumerate(self.inner.layers)]
        first, facts = self.inner.layers[0], store.facts[0]
        heads, groups, width = facts.heads or (0, 0, 0)
        shape = Shape(heads, groups, width, _activation(model) or 0, _eps(first.input_layernorm), offset)
        self._decoder = Decoder(layers, shape, store.layers)
        self._one = nn.ModuleList([_AsOne(self)])

    def _layer(self, layer: Any, number: int) -> Layer:
        linears = [self.rack.linear(layer.get_submodule(path)) for path in _LINEARS]
        norm1, norm2, q_norm, k_norm = (_weight(layer, path) for path in _NORMS)
        assert norm1 is not None
        assert norm2 is not None  # it has the form
        own = [one for one in linears if one is not None]
        return Layer(norm1, norm2, q_norm, k_norm, own, self.store.facts[number].look)

    @contextmanager
    def standing(self) -> Iterator[None]:
        own = self.inner.layers
        self.inner.layers = self._one
        try:
            yield
        finally:
            self.inner.layers = own

    def run(self, hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        pieces = self.store.passed()
        out = self._decoder(hidden[0], cosines[0], sines[0], pieces, self.rack.adapters)
        return out.unsqueeze(0)


class _AsOne(nn.Module):
    """Stands in for all layers of a decoder."""

    def __init__(self, layers: DecoderLayers) -> None:
        super().__init__()
        self.run = layers.run

    def forward(self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any) -> Tensor:
        return self.run(hidden_states, *position_embeddings)


def decoder_layers(model: Any, rack: Rack, store: Store, offset: float) -> DecoderLayers | None:
    """The layers as one, or None where they have not the form; `store` has seen a pass."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != len(store.layers):
        return None
    alike = len({(facts.heads, facts.look.scale) for facts in store.facts}) == 1
    plain = all(not facts.look.softcap and facts.heads is not None for facts in store.facts)
    if not (alike and plain and _activation(model) is not None):
        return None
    if not all(_has_the_form(layer, rack, store) for layer in layers):
        return None
    return DecoderLayers(model, rack, store, offset)


def _has_the_form(layer: Any, rack: Rack, store: Store) -> bool:
    held = {name for name, module in layer.named_modules() if list(module.parameters(recurse=False))}
    held |= {path for path in _LINEARS if _found(layer, path) is not None}
    outer = {name for name in held if not any(name.startswith(f"{path}.") for path in _LINEARS)}
    if not (set(_LINEARS) | set(_NORMS[:2]) <= outer <= set(_LINEARS) | set(_NORMS)):
        return False
    if len({name in outer for name in _NORMS[2:]}) != 1:
        return False
    linears = [rack.linear(layer.get_submodule(path)) for path in _LINEARS]
    return all(one is not None for one in linears) and _sizes_fit(layer, linears, store)  # type: ignore[arg-type]


def _sizes_fit(layer: Any, linears: Sequence[Grouped], store: Store) -> bool:
    """Whether the C side, which is told sizes once, reads everything within its bounds."""
    heads, groups, width = store.facts[0].heads or (0, 0, 0)
    hidden, wide = linears[0].inputs, linears[4].outputs
    expected = [(hidden, heads * width), *[(hidden, groups * width)] * 2, (heads * width, hidden)]
    expected += [*[(hidden, wide)] * 2, (wide, hidden)]
    if [(one.inputs, one.outputs) for one in linears] != expected or width % 2:
        return False
    norms = [weight for path in _NORMS if (weight := _weight(layer, path)) is not None]
    lengths = [len(weight) for weight in norms]
    fits = lengths in ([hidden, hidden], [hidden, hidden, width, width])
    same = len({_eps(layer.get_submodule(path)) for path in _NORMS if _weight(layer, path) is not None}) == 1
    return fits and same and serves_grouped(*norms, linears[0].weight, store.layers[0][0])  # type: ignore[arg-type]


def _found(layer: Any, path: str) -> nn.Module | None:
    try:
        found: nn.Module = layer.get_submodule(path)
    except AttributeError:
        return None
    return found


def _weight(layer: Any, path: str) -> Tensor | None:
    module = _found(layer, path)
    weight = getattr(module, "weight", None)
    return weight.detach() if isinstance(weight, Tensor) else None


def _eps(norm: Any) -> float:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) else float("nan")


def _activation(model: Any) -> int | None:
    config = model.config.get_text_config()
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return _ACTIVATIONS.get(str(name))
