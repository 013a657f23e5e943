"""Where a model family keeps which tensor: one row a tensor, no code.

    path  kind  size …  [| bias]  [? condition]

`{layers}` in a path stands for 0, 1, … below that size.  A size is a sum of products of numbers and names of `Sizes`
(sizes.py).  `bias` is `yes` or the config's flag that says so; the bias is as long as the weight's outputs.  A row
with a condition is there when that fact holds, for the layer at hand.  Kinds: `linear` (outputs, inputs), `conv1d`
(a linear layer stored the other way round), `embedding`, `table` (one that is looked up otherwise, and no
site), `norm`, `convolution`, and for bare parameters, whose path is
their own name, `experts` and `parameter`.

Names and shapes are those of transformers' modules; tests/planning/test_shapes.py builds each family there on the
meta device and compares every name and shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family's rows; `defaults` are values its config class has and config.json may leave out.

    Attributes:
        model_class: transformers' class that has these tensors.
        packed: whether its attention takes packed streams (engine/attention.py); others go in padded rows.
        rotary: positions are turned into q and k, which makes new tensors of them.
        norm: `rms` as transformers writes it out, or torch's fused `layer` norm.
    """

    rows: str
    model_class: str = "AutoModelForCausalLM"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = True
    rotary: bool = True
    norm: str = "rms"


def _at(prefix: str, rows: str) -> str:
    return "\n".join(prefix + row for row in rows.strip().splitlines())


_OUTSIDE = """
model.embed_tokens embedding vocab hidden
model.norm norm hidden
lm_head linear vocab hidden ? untied
"""
_ATTENTION = """
self_attn.q_proj linear q hidden | attention_bias
self_attn.k_proj linear kv hidden | attention_bias
self_attn.v_proj linear kv hidden | attention_bias
self_attn.o_proj linear hidden q | attention_bias
"""
_FEED_FORWARD = """
mlp.gate_proj linear ffn hidden | mlp_bias
mlp.up_proj linear ffn hidden | mlp_bias
mlp.down_proj linear hidden ffn | mlp_bias
"""
_BEFORE_AND_BETWEEN = """
input_layernorm norm hidden
post_attention_layernorm norm hidden
"""
_HEAD_NORMS = """
self_attn.q_norm norm head_dim
self_attn.k_norm norm head_dim
"""
_FOUR_NORMS = _BEFORE_AND_BETWEEN + "pre_feedforward_layernorm norm hidden\npost_feedforward_layernorm norm hidden"
_EXPERTS = """
mlp.gate.weight parameter experts hidden ? sparse
mlp.experts.gate_up_proj experts experts 2*expert_ffn hidden ? sparse
mlp.experts.down_proj experts experts hidden expert_ffn ? sparse
"""
_DENSE_BETWEEN = "\n".join(f"{row} ? dense" for row in _FEED_FORWARD.strip().splitlines())
_QKV_BIAS = (
    _ATTENTION.replace("attention_bias", "qkv_bias").replace("hidden q | qkv_bias", "hidden q").replace("\n\n", "\n")
)


def _blocks(*parts: str) -> str:
    return _at("model.layers.{layers}.", "".join(part.strip() + "\n" for part in parts)) + _OUTSIDE


_LLAMA = _blocks(_ATTENTION, _FEED_FORWARD, _BEFORE_AND_BETWEEN)
_QWEN3 = _blocks(_ATTENTION, _HEAD_NORMS, _FEED_FORWARD, _BEFORE_AND_BETWEEN)
_OLMO2 = _blocks(
    _ATTENTION,
    "self_attn.q_norm norm q\nself_attn.k_norm norm kv",
    _FEED_FORWARD,
    "post_attention_layernorm norm hidden\npost_feedforward_layernorm norm hidden",
)
_SHARED_EXPERT = """
mlp.shared_expert.gate_proj linear shared_ffn hidden ? sparse
mlp.shared_expert.up_proj linear shared_ffn hidden ? sparse
mlp.shared_expert.down_proj linear hidden shared_ffn ? sparse
mlp.shared_expert_gate linear 1 hidden ? sparse
"""
_STARCODER2 = """
self_attn.q_proj linear q hidden | use_bias
self_attn.k_proj linear kv hidden | use_bias
self_attn.v_proj linear kv hidden | use_bias
self_attn.o_proj linear hidden q | use_bias
mlp.c_fc linear ffn hidden | use_bias
mlp.c_proj linear hidden ffn | use_bias
input_layernorm norm hidden | yes
post_attention_layernorm norm hidden | yes
"""
_PHI = """
self_attn.q_proj linear q hidden | yes
self_attn.k_proj linear kv hidden | yes
self_attn.v_proj linear kv hidden | yes
self_attn.dense linear hidden q | yes
mlp.fc1 linear ffn hidden | yes
mlp.fc2 linear hidden ffn | yes
input_layernorm norm hidden | yes
"""
_PHI3 = """
self_attn.qkv_proj linear q+2*kv hidden
self_attn.o_proj linear hidden q
mlp.gate_up_proj linear 2*ffn hidden
mlp.down_proj linear hidden ffn
"""
_GPT2 = """
attn.c_attn conv1d 3*hidden hidden | yes
attn.c_proj conv1d hidden hidden | yes
mlp.c_fc conv1d ffn hidden | yes
mlp.c_proj conv1d hidden ffn | yes
ln_1 norm hidden | yes
ln_2 norm hidden | yes
"""
_GPTJ = """
attn.k_proj linear hidden hidden
attn.v_proj linear hidden hidden
attn.q_proj linear hidden hidden
attn.out_proj linear hidden hidden
mlp.fc_in linear ffn hidden | yes
mlp.fc_out linear hidden ffn | yes
ln_1 norm hidden | yes
"""
_NEOX = """
attention.query_key_value linear 3*hidden hidden | attention_bias
attention.dense linear hidden hidden | attention_bias
mlp.dense_h_to_4h linear ffn hidden | yes
mlp.dense_4h_to_h linear hidden ffn | yes
input_layernorm norm hidden | yes
post_attention_layernorm norm hidden | yes
"""
_BLOOM = """
self_attention.query_key_value linear 3*hidden hidden | yes
self_attention.dense linear hidden hidden | yes
mlp.dense_h_to_4h linear 4*hidden hidden | yes
mlp.dense_4h_to_h linear hidden 4*hidden | yes
input_layernorm norm hidden | yes
post_attention_layernorm norm hidden | yes
"""
_OPT = """
self_attn.k_proj linear hidden hidden | enable_bias
self_attn.v_proj linear hidden hidden | enable_bias
self_attn.q_proj linear hidden hidden | enable_bias
self_attn.out_proj linear hidden hidden | enable_bias
self_attn_layer_norm norm hidden | yes
fc1 linear ffn hidden | enable_bias
fc2 linear hidden ffn | enable_bias
final_layer_norm norm hidden | yes
"""
_BERT = """
attention.self.query linear hidden hidden | yes
attention.self.key linear hidden hidden | yes
attention.self.value linear hidden hidden | yes
attention.output.dense linear hidden hidden | yes
attention.output.LayerNorm norm hidden | yes
intermediate.dense linear ffn hidden | yes
output.dense linear hidden ffn | yes
output.LayerNorm norm hidden | yes
"""
_BERT_OUTSIDE = """
embeddings.word_embeddings embedding vocab hidden
embeddings.position_embeddings embedding positions hidden
embeddings.token_type_embeddings embedding type_vocab_size hidden
embeddings.LayerNorm norm hidden | yes
pooler.dense linear hidden hidden | yes
"""
_VIT = """
attention.q_proj linear q hidden | qkv_bias
attention.k_proj linear q hidden | qkv_bias
attention.v_proj linear q hidden | qkv_bias
attention.o_proj linear hidden q | yes
layernorm_before norm hidden | yes
layernorm_after norm hidden | yes
mlp.fc1 linear ffn hidden | yes
mlp.fc2 linear hidden ffn | yes
"""
_T5_ATTENTION = """
layer.0.SelfAttention.q linear q hidden
layer.0.SelfAttention.k linear q hidden
layer.0.SelfAttention.v linear q hidden
layer.0.SelfAttention.o linear hidden q
layer.0.layer_norm norm hidden
"""


def _t5_feed_forward(place: int) -> str:
    return f"""
layer.{place}.DenseReluDense.wi linear ffn hidden ? ungated
layer.{place}.DenseReluDense.wi_0 linear ffn hidden ? gated
layer.{place}.DenseReluDense.wi_1 linear ffn hidden ? gated
layer.{place}.DenseReluDense.wo linear hidden ffn
layer.{place}.layer_norm norm hidden
"""


_T5 = (
    _at("encoder.block.{layers}.", _T5_ATTENTION.strip() + _t5_feed_forward(1))
    + "\n"
    + _at(
        "decoder.block.{decoder_layers}.",
        _T5_ATTENTION.strip()
        + _T5_ATTENTION.rstrip().replace("layer.0", "layer.1").replace("SelfAttention", "EncDecAttention")
        + _t5_feed_forward(2),
    )
    + """
shared embedding vocab hidden
encoder.block.0.layer.0.SelfAttention.relative_attention_bias embedding relative_attention_num_buckets heads
decoder.block.0.layer.0.SelfAttention.relative_attention_bias embedding relative_attention_num_buckets heads
encoder.final_layer_norm norm hidden
decoder.final_layer_norm norm hidden
lm_head linear vocab hidden ? untied
"""
)
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_LAYER_NORMED: dict[str, Any] = {"norm": "layer"}

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA, defaults=_UNTIED),
    "mistral": Family(_LLAMA, defaults=_UNTIED | {"num_key_value_heads": 8}),
    "granite": Family(_LLAMA, defaults=_UNTIED),
    "smollm3": Family(_LLAMA, defaults=_TIED | {"num_key_value_heads": 4}),
    "gemma": Family(_LLAMA, defaults=_TIED | {"head_dim": 256, "num_key_value_heads": 16}),
    "qwen2": Family(_blocks(_QKV_BIAS, _FEED_FORWARD, _BEFORE_AND_BETWEEN), defaults=_UNTIED | {"qkv_bias": True}),
    "qwen3": Family(_QWEN3, defaults=_UNTIED | {"head_dim": 128}),
    "gemma2": Family(
        _blocks(_ATTENTION, _FEED_FORWARD, _FOUR_NORMS),
        defaults=_TIED | {"head_dim": 256, "num_key_value_heads": 4},
    ),
    "gemma3_text": Family(
        _blocks(_ATTENTION, _HEAD_NORMS, _FEED_FORWARD, _FOUR_NORMS),
        defaults=_TIED | {"head_dim": 256, "num_key_value_heads": 4},
    ),
    "olmo": Family(
        _blocks(_ATTENTION, _FEED_FORWARD).replace("model.norm norm hidden\n", ""), defaults=_UNTIED, norm="layer"
    ),
    "olmo2": Family(_OLMO2, defaults=_UNTIED),
    "phi3": Family(_blocks(_PHI3, _BEFORE_AND_BETWEEN), defaults=_UNTIED),
    "phi": Family(
        _blocks(_PHI)
        .replace("model.norm norm hidden", "model.final_layernorm norm hidden | yes")
        .replace("vocab hidden ? untied", "vocab hidden | yes ? untied"),
        defaults=_UNTIED,
        **_LAYER_NORMED,
    ),
    "cohere": Family(
        _blocks(_ATTENTION, _FEED_FORWARD, "input_layernorm norm hidden"),
        defaults=_TIED,
    ),
    "starcoder2": Family(
        _blocks(_STARCODER2).replace("model.norm norm hidden", "model.norm norm hidden | yes"),
        defaults=_TIED | {"use_bias": True, "num_key_value_heads": 2},
        **_LAYER_NORMED,
    ),
    "mixtral": Family(
        _blocks(_ATTENTION, _EXPERTS, _BEFORE_AND_BETWEEN), defaults=_UNTIED | {"num_key_value_heads": 8}
    ),
    "qwen2_moe": Family(
        _blocks(_QKV_BIAS, _EXPERTS, _SHARED_EXPERT, _DENSE_BETWEEN, _BEFORE_AND_BETWEEN),
        defaults=_UNTIED | {"qkv_bias": True, "num_experts": 60, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": Family(
        _blocks(_ATTENTION, _HEAD_NORMS, _EXPERTS, _DENSE_BETWEEN, _BEFORE_AND_BETWEEN),
        defaults=_UNTIED | {"num_experts": 128, "decoder_sparse_step": 1},
    ),
    "gpt2": Family(
        _at("transformer.h.{layers}.", _GPT2)
        + """
transformer.wte embedding vocab hidden
transformer.wpe embedding positions hidden
transformer.ln_f norm hidden | yes
lm_head linear vocab hidden ? untied
""",
        defaults=_TIED | {"activation_function": "gelu_new"},
        rotary=False,
        **_LAYER_NORMED,
    ),
    "gptj": Family(
        _at("transformer.h.{layers}.", _GPTJ)
        + """
transformer.wte embedding vocab hidden
transformer.ln_f norm hidden | yes
lm_head linear vocab hidden | yes ? untied
""",
        defaults=_UNTIED | {"activation_function": "gelu_new"},
        packed=False,
        **_LAYER_NORMED,
    ),
    "gpt_neox": Family(
        _at("gpt_neox.layers.{layers}.", _NEOX)
        + """
gpt_neox.embed_in embedding vocab hidden
gpt_neox.final_layer_norm norm hidden | yes
lm_head linear vocab hidden ? untied
""",
        defaults=_UNTIED | {"attention_bias": True},
        **_LAYER_NORMED,
    ),
    "bloom": Family(
        _at("transformer.h.{layers}.", _BLOOM)
        + """
transformer.word_embeddings embedding vocab hidden
transformer.word_embeddings_layernorm norm hidden | yes
transformer.ln_f norm hidden | yes
lm_head linear vocab hidden ? untied
""",
        defaults=_TIED,
        packed=False,
        rotary=False,
        **_LAYER_NORMED,
    ),
    "opt": Family(
        _at("model.decoder.layers.{layers}.", _OPT)
        + """
model.decoder.embed_tokens embedding vocab projection
model.decoder.embed_positions table positions+2 hidden
model.decoder.project_in linear hidden projection ? projected
model.decoder.project_out linear projection hidden ? projected
model.decoder.final_layer_norm norm hidden | yes ? norm_before
lm_head linear vocab projection ? untied
""",
        defaults=_TIED | {"enable_bias": True, "do_layer_norm_before": True, "activation_function": "relu"},
        rotary=False,
        **_LAYER_NORMED,
    ),
    **{
        name: Family(
            _at("encoder.layer.{layers}.", _BERT) + _BERT_OUTSIDE,
            "AutoModel",
            _TIED | {"type_vocab_size": 2},
            packed=False,
            rotary=False,
            **_LAYER_NORMED,
        )
        for name in ("bert", "roberta")
    },
    "t5": Family(_T5, "AutoModelForSeq2SeqLM", _TIED | {"relative_attention_num_buckets": 32}, False, False),
    "vit": Family(
        _at("layers.{layers}.", _VIT)
        + """
embeddings.cls_token parameter 1 1 hidden
embeddings.position_embeddings parameter 1 patches+1 hidden
embeddings.patch_embeddings.projection convolution hidden num_channels patch patch | yes
layernorm norm hidden | yes
pooler.dense linear hidden hidden | yes
""",
        "AutoModel",
        _TIED | {"qkv_bias": True, "num_channels": 3, "patch_size": 16, "image_size": 224},
        packed=False,
        rotary=False,
        **_LAYER_NORMED,
    ),
}
