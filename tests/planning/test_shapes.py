"""Shapes from a config alone are those of the model that transformers builds from it."""

import json

import pytest
import torch
import transformers as hf

from rankwise.errors import ModelError
from rankwise.planning.config import describe
from rankwise.planning.families import FAMILIES
from rankwise.planning.shapes import shapes_of
from rankwise.surgery.sites import find_sites
from tests.jobs.world import write_model

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "llama": hf.LlamaConfig(**GROUPED),
    "llama with biases, tied": hf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": hf.MistralConfig(**GROUPED),
    "granite": hf.GraniteConfig(**GROUPED, attention_bias=True),
    "smollm3": hf.SmolLM3Config(**GROUPED),
    "gemma": hf.GemmaConfig(**GROUPED, head_dim=16),
    "gemma2": hf.Gemma2Config(**GROUPED, head_dim=16),
    "gemma3": hf.Gemma3TextConfig(**GROUPED, head_dim=16),
    "qwen2": hf.Qwen2Config(**GROUPED),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=16),
    "olmo": hf.OlmoConfig(**GROUPED),
    "olmo2": hf.Olmo2Config(**GROUPED),
    "phi": hf.PhiConfig(**SMALL),
    "phi3": hf.Phi3Config(**GROUPED),
    "cohere": hf.CohereConfig(**GROUPED),
    "starcoder2": hf.Starcoder2Config(**GROUPED),
    "mixtral": hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2 experts": hf.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[1]),
    "qwen3 experts": hf.Qwen3MoeConfig(**EXPERTS, head_dim=16, decoder_sparse_step=2),
    "gpt2": hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gptj": hf.GPTJConfig(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4),
    "gpt-neox": hf.GPTNeoXConfig(**SMALL),
    "bloom": hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=3, n_head=4),
    "opt": hf.OPTConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, ffn_dim=48),
    "opt, projected": hf.OPTConfig(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=16
    ),
    "bert": hf.BertConfig(**SMALL),
    "roberta": hf.RobertaConfig(**SMALL),
    "t5": hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4),
    "t5, gated": hf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    ),
    "vit": hf.ViTConfig(**{k: v for k, v in SMALL.items() if "vocab" not in k and "position" not in k}, image_size=32),
}


def on_meta(config: hf.PreTrainedConfig) -> torch.nn.Module:
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        return getattr(hf, family.model_class).from_config(config)


def read_back(config: hf.PreTrainedConfig) -> dict:
    """As it would stand in config.json."""
    return json.loads(json.dumps(config.to_dict(), default=str))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_name_and_shape_is_the_model_s(name):
    config = CONFIGS[name]
    model = on_meta(config)
    found = shapes_of(read_back(config), {}, name)
    want = {path: tuple(parameter.shape) for path, parameter in model.named_parameters()}
    assert {tensor.name: tensor.shape for tensor in found.tensors} == want
    assert len(found.tensors) == len(want)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not found.notes


@pytest.mark.parametrize("name", CONFIGS)
def test_what_can_be_adapted_is_what_surgery_finds(name):
    config = CONFIGS[name]
    found = {t.layer: (t.role, t.outputs, t.inputs) for t in shapes_of(read_back(config), {}, name).tensors if t.role}
    sites = {s.path: s for s in find_sites(on_meta(config)).values()}
    own = {path for path, _ in on_meta(config).named_parameters()}  # others are tied to one of these
    tied = {path for path in sites if path not in found and f"{path}.weight" not in own}
    want = {
        path: (site.role, site.shape.outputs, site.shape.inputs * _kernel(site))
        for path, site in sites.items()
        if path not in tied
    }
    assert found == want


def _kernel(site) -> int:
    return torch.Size(site.shape.kernel).numel()


def test_every_family_is_tried():
    assert set(FAMILIES) == {config.model_type for config in CONFIGS.values()}


def test_an_unknown_type_is_taken_for_a_llama_and_says_so():
    config = read_back(CONFIGS["llama"]) | {"model_type": "llama9"}
    found = shapes_of(config, {}, "x")
    assert found.tensors == shapes_of(read_back(CONFIGS["llama"]), {}, "x").tensors
    assert "'llama9' is not in the table" in found.notes[0]


def test_the_language_part_of_a_model_that_sees():
    config = {"model_type": "gemma3", "text_config": read_back(CONFIGS["gemma3"])}
    found = shapes_of(config, {}, "x")
    assert found.parameters == shapes_of(read_back(CONFIGS["gemma3"]), {}, "x").parameters
    assert "without the headers" in found.notes[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_headers_of_real_files_agree_with_the_config(tmp_path, family):
    folder = write_model(tmp_path / family, family=family)
    described = describe(folder)
    found = shapes_of(described.config, described.headers, "x")
    alone = shapes_of(described.config, {}, "x")
    assert {t.name: (t.shape, t.kind, t.role) for t in found.tensors} == {
        t.name: (t.shape, t.kind, t.role) for t in alone.tensors
    }
    assert not found.notes
    assert found.stored_bytes == 4 * found.parameters


def test_headers_are_believed_where_they_differ(tmp_path):
    folder = write_model(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 64}
    found = shapes_of(config, describe(folder).headers, "x")
    assert {t.shape for t in found.linear if t.name.endswith("up_proj.weight")} == {(48, 32)}
    assert "up_proj.weight: (48, 32) on disk, (64, 32) by config" in found.notes[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "no hidden_size or"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers = 'many'"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"vocab_size": 2**60}, "vocab_size"),
        ({"num_hidden_layers": 2**30}, "1,073,741,824 layers"),
        ({"vocab_size": None}, "has no 'vocab' size"),
    ],
)
def test_a_config_that_makes_no_model_is_told(change, said):
    with pytest.raises(ModelError, match=said):
        shapes_of(read_back(CONFIGS["llama"]) | change, {}, "x")
