"""llama.cpp's adapter, read back by the package gguf and by arithmetic of its own; rows of Q and K by transformers."""

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from rankwise.errors import AdapterFileError, ModelError
from tests.formats.folders import PATTERNS, convert, deltas, peft_folder
from tests.grid import relative
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

# Layers that are adapted, and what llama.cpp calls the tensors of the second block.
LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PHI3 = {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up"}
GPT2 = {"attn.c_attn": "attn_qkv", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
FAMILIES = {
    "llama": ("llama", LLAMA),
    "mistral": ("llama", LLAMA),
    "granite": ("granite", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "gemma2": ("gemma2", LLAMA),
    "gemma3": ("gemma3", LLAMA),
    "olmo2": ("olmo2", LLAMA),
    "phi3": ("phi3", PHI3),
    "gpt2": ("gpt2", GPT2),
}
PERMUTED = ("llama", "mistral", "granite")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with config and weights, by name, written when asked for."""
    home = tmp_path_factory.mktemp("models")

    def folder(name: str):
        if not (home / name).exists():
            tiny(name).save_pretrained(home / name)
        return str(home / name)

    return folder


def products(path) -> dict[str, np.ndarray]:
    """B·A of every tensor as llama.cpp computes it: without alpha the factor is 1."""
    reader = gguf.GGUFReader(path)
    assert "adapter.lora.alpha" not in reader.fields
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    return {
        name.removesuffix(".lora_a"): stored[name.removesuffix("a") + "b"] @ A
        for name, A in stored.items()
        if name.endswith(".lora_a")
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_is_pefts_in_llama_cpps_names_and_order(models, tmp_path, name):
    architecture, layers = FAMILIES[name]
    config = PATTERNS | {"target_modules": [layer.rsplit(".", 1)[-1] for layer in layers]}
    want = peft_folder(tmp_path / "peft", tiny(name), **config)
    found = convert(tmp_path / "peft", "gguf", tmp_path / "a.gguf", model=models(name))
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    said = {key: fields[key].contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert list(said.values()) == ["adapter", "lora", architecture]
    got = products(tmp_path / "a.gguf")
    assert len(got) == len(want) == found["layers"]
    stack = "transformer.h" if name == "gpt2" else "model.layers"
    order = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    for layer, short in layers.items():
        path, tensor = f"{stack}.1.{layer}", f"blk.1.{short}.weight"
        own = got[tensor]
        if name in PERMUTED and short in ("attn_q", "attn_k"):
            assert relative(torch.from_numpy(own), want[path]) > 0.1
            own = order.process(own, tensor).weights  # what transformers does to the weight itself
        theirs = want[path].t() if name == "gpt2" else want[path]
        assert relative(torch.from_numpy(own.copy()), theirs.double()) < 1e-6, path


def test_there_and_back_again_is_the_same_change_in_peft(models, tmp_path):
    want = peft_folder(tmp_path / "peft", tiny("llama"), target_modules="all-linear", **PATTERNS)
    convert(tmp_path / "peft", "gguf", tmp_path / "a.gguf", model=models("llama"))
    convert(tmp_path / "a.gguf", "peft", tmp_path / "back", model=models("llama"))
    got = deltas(PeftModel.from_pretrained(tiny("llama"), tmp_path / "back"))
    assert got.keys() == want.keys()
    for path in want:
        assert relative(got[path], want[path]) < 1e-6, path


def test_conv1d_comes_back_transposed_as_peft_wants_it(models, tmp_path):
    want = peft_folder(tmp_path / "peft", tiny("gpt2"), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    convert(tmp_path / "peft", "gguf", tmp_path / "a.gguf", model=models("gpt2"))
    convert(tmp_path / "a.gguf", "peft", tmp_path / "back", model=models("gpt2"))
    got = deltas(PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "back"))
    assert all(relative(got[path], want[path]) < 1e-6 for path in want)


def test_an_embedding_of_its_own_has_its_a_by_words(models, tmp_path):
    want = peft_folder(tmp_path / "peft", tiny("llama"), target_modules=["embed_tokens", "lm_head"])
    convert(tmp_path / "peft", "gguf", tmp_path / "a.gguf", model=models("llama"))
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    A, B = stored["token_embd.weight.lora_a"], stored["token_embd.weight.lora_b"]
    assert tuple(A.shape) == (97, 4)
    assert relative(A @ B.t(), want["model.embed_tokens"]) < 1e-6
    head = stored["output.weight.lora_b"] @ stored["output.weight.lora_a"]
    assert relative(head, want["lm_head"]) < 1e-6
    convert(tmp_path / "a.gguf", "peft", tmp_path / "back", model=models("llama"))
    got = deltas(PeftModel.from_pretrained(tiny("llama"), tmp_path / "back"))
    assert all(relative(got[path], want[path]) < 1e-6 for path in want)


@pytest.mark.parametrize(("dtype", "kind", "most"), [("f16", "F16", 1e-3), ("bf16", "BF16", 6e-3)])
def test_in_16_bits_the_rounding_is_told(models, tmp_path, dtype, kind, most):
    want = peft_folder(tmp_path / "peft", tiny("qwen2"), target_modules=["k_proj"])
    found = convert(tmp_path / "peft", "gguf", tmp_path / "a.gguf", model=models("qwen2"), dtype=dtype)
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {kind}
    got = products(tmp_path / "a.gguf")
    pairs = [
        (torch.from_numpy(got[f"blk.{i}.attn_k.weight"]), want[f"model.layers.{i}.self_attn.k_proj"]) for i in (0, 1)
    ]
    missed = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    assert 0 < found["error"] < most
    assert found["error"] == pytest.approx(missed**0.5, rel=1e-3)


@pytest.mark.parametrize("alpha", [10.0, 0.0])
def test_the_one_alpha_of_a_foreign_file_is_divided_by_each_rank(models, tmp_path, alpha):
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    drawn = np.random.default_rng(0).standard_normal
    stored = {}
    for block, rank in enumerate((2, 5)):
        stored[block] = drawn((rank, 32)).astype(np.float32), drawn((48, rank)).astype(np.float32)
        writer.add_tensor(f"blk.{block}.ffn_up.weight.lora_a", stored[block][0])
        writer.add_tensor(f"blk.{block}.ffn_up.weight.lora_b", stored[block][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "theirs.gguf", "peft", tmp_path / "back", model=models("qwen2"))
    got = deltas(PeftModel.from_pretrained(tiny("qwen2"), tmp_path / "back"))
    for block, (A, B) in stored.items():
        want = torch.from_numpy((alpha / len(A) if alpha else 1.0) * B.astype(np.float64) @ A)
        assert relative(got[f"model.layers.{block}.mlp.up_proj"], want) < 1e-6


def test_the_model_is_found_where_the_adapter_names_it_and_asked_for_where_not(models, tmp_path):
    model = tiny("qwen2").from_pretrained(models("qwen2"))
    peft_folder(tmp_path / "named", model, target_modules=["k_proj"])
    assert convert(tmp_path / "named", "gguf", tmp_path / "a.gguf")["layers"] == 2
    peft_folder(tmp_path / "unnamed", tiny("qwen2"), target_modules=["k_proj"])
    with pytest.raises(ModelError, match="depend on the model\n  → say which: --model"):
        convert(tmp_path / "unnamed", "gguf", tmp_path / "b.gguf")
    peft_folder(tmp_path / "neox", tiny("gpt-neox"), target_modules=["dense_4h_to_h"])
    with pytest.raises(ModelError, match="the family 'gpt_neox' is not known"):
        convert(tmp_path / "neox", "gguf", tmp_path / "b.gguf", model=models("gpt-neox"))
    assert not (tmp_path / "b.gguf").exists()


def test_all_that_has_no_place_is_said_at_once(models, tmp_path):
    config = {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}
    peft_folder(tmp_path / "peft", tiny("llama"), **config)
    with pytest.raises(AdapterFileError) as refused:
        convert(tmp_path / "peft", "gguf", tmp_path / "a.gguf", model=models("llama"))
    assert "no place for 2 parts" in refused.value.message
    assert "magnitudes of 2 layers, model.layers.0.self_attn.q_proj first" in refused.value.message
    assert "lm_head: a layer trained whole" in refused.value.message
    assert "rankwise merge" in refused.value.hint
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_tied_head_or_embedding_is_refused(models, tmp_path, layer):
    peft_folder(tmp_path / "peft", tiny("llama-tied"), target_modules=[layer, "q_proj"])
    with pytest.raises(AdapterFileError, match=rf"{layer}: embedding and head are one tensor"):
        convert(tmp_path / "peft", "gguf", tmp_path / "a.gguf", model=models("llama-tied"))


def test_a_model_of_another_size_is_told_layer_by_layer(models, tmp_path):
    peft_folder(tmp_path / "peft", tiny("qwen3"), target_modules=["q_proj", "down_proj"])
    with pytest.raises(
        AdapterFileError, match=r"layers.0.self_attn.q_proj: made for a weight 64 × 32, there it is 32 × 32"
    ):
        convert(tmp_path / "peft", "gguf", tmp_path / "a.gguf", model=models("llama"))


def test_a_model_in_gguf_is_no_adapter(models, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterFileError, match=r"general\.type is None, expected 'adapter'"):
        convert(tmp_path / "model.gguf", "peft", tmp_path / "out", model=models("llama"))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:60])
    with pytest.raises(AdapterFileError, match="not a whole GGUF file"):
        convert(tmp_path / "cut.gguf", "peft", tmp_path / "out", model=models("llama"))
