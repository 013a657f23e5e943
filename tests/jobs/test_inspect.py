import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rankwise.errors import AdapterFileError, ModelError
from rankwise.jobs.inspect import run_inspection
from tests.jobs.world import read, write_adapter, write_model


def dense_norms(folder, scale) -> dict[str, float]:
    """‖s·B·A‖ by site, multiplied out in float64 from the file's own tensors."""
    stored = load_file(folder / "adapter_model.safetensors")
    norms = {}
    for key, A in stored.items():
        if ".lora_A." in key or key.endswith("lora_embedding_A"):
            B = stored[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            path = key.removeprefix("base_model.model.").split(".lora_")[0]
            norms[path] = float((scale(path, A.shape[0]) * B.double().flatten(1) @ A.double().flatten(1)).norm())
    return norms


def test_an_adapter_of_ours_is_shown_whole(world, run):
    found = run_inspection(str(run["out"]))
    json.dumps(found, allow_nan=False)
    assert found["kind"] == "adapter"
    assert found["base"] == run["record"]["base"]
    assert found["base"]["name"] == str(world / "llama")
    assert found["digest"] == run["record"]["digest"]
    assert found["parameters"] == run["record"]["parameters"]
    assert found["training"] == run["record"]["training"]
    assert found["changes_nothing"] is False
    norms = {path: site["delta_norm"] for path, site in found["sites"].items()}
    assert norms == pytest.approx(dense_norms(run["out"], lambda path, rank: 32 / rank), rel=1e-9)
    assert {path: (site["rank"], site["scale"]) for path, site in found["sites"].items()} == {
        path: (site["rank"], site["scale"]) for path, site in run["record"]["sites"].items()
    }


def test_ranks_scales_and_norms_are_those_of_each_site(world, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5}}
    targets = ("q_proj", "embed_tokens")
    write_adapter(tmp_path, world / "llama", targets=targets, scaling="alpha/sqrt(r)", **patterns)
    found = run_inspection(str(tmp_path))["sites"]
    words = read(world / "llama" / "config.json")["vocab_size"]
    expected = {
        "model.embed_tokens": (4, 8 / 2, [words, 32]),
        "model.layers.0.self_attn.q_proj": (2, 8 / math.sqrt(2), [32, 32]),
        "model.layers.1.self_attn.q_proj": (2, 5 / math.sqrt(2), [32, 32]),
    }
    assert found.keys() == expected.keys()
    for path, (rank, scale, shape) in expected.items():
        assert found[path]["rank"] == rank
        assert found[path]["scale"] == pytest.approx(scale, rel=1e-12)
        assert sorted(found[path]["shape"]) == sorted(shape)
    norms = dense_norms(tmp_path, lambda path, rank: expected[path][1])
    assert {path: site["delta_norm"] for path, site in found.items()} == pytest.approx(norms, rel=1e-6)


def test_an_adapter_of_peft_is_shown_with_the_base_it_names(world, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world / "gpt2")
    config = LoraConfig(r=3, lora_alpha=9, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    get_peft_model(model, config).save_pretrained(tmp_path)
    found = run_inspection(str(tmp_path))
    assert found["base"] == {"name": str(world / "gpt2"), "fingerprint": None}
    assert found["training"] is None
    norms = {path: site["delta_norm"] for path, site in found["sites"].items()}
    assert len(norms) == 2
    assert norms == pytest.approx(dense_norms(tmp_path, lambda path, rank: 3.0), rel=1e-9)


def test_an_adapter_of_zeros_changes_nothing_and_is_said_to(world, tmp_path):
    write_adapter(tmp_path, world / "llama", size=0)
    found = run_inspection(str(tmp_path))
    assert found["changes_nothing"] is True
    assert {site["delta_norm"] for site in found["sites"].values()} == {0.0}


def test_what_dora_changes_is_not_told_without_the_base(world, tmp_path):
    write_adapter(tmp_path, world / "llama", form="dora")
    found = run_inspection(str(tmp_path))
    assert found["changes_nothing"] is False
    assert {site["delta_norm"] for site in found["sites"].values()} == {None}


def test_a_model_is_shown_by_its_config_alone(world, tmp_path):
    (tmp_path / "config.json").write_text((world / "llama" / "config.json").read_text())
    found = run_inspection(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    assert found["kind"] == "model"
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["presets"]["minimal"] == {"layers": ["q_proj", "v_proj"], "sites": 4, "parameters_per_rank": 224}
    assert found["presets"]["all-linear"]["sites"] == 14
    weights = dict(model.named_modules())
    for path, site in found["sites"].items():
        assert sorted(site["shape"]) == sorted(weights[path].weight.shape)
    assert found["sites"]["model.layers.0.self_attn.k_proj"]["role"] == "key"


def test_what_a_model_offers_is_what_an_adapter_then_has(world, tmp_path):
    write_adapter(tmp_path, world / "gpt2", rank=3, targets="attention")
    offered, adapter = run_inspection(str(world / "gpt2")), run_inspection(str(tmp_path))
    assert adapter["parameters"] == 3 * offered["presets"]["attention"]["parameters_per_rank"]
    assert {path: site["shape"] for path, site in adapter["sites"].items()} == {
        path: offered["sites"][path]["shape"] for path in adapter["sites"]
    }


def test_a_tied_head_is_counted_once(world):
    model = AutoModelForCausalLM.from_pretrained(world / "tied")
    assert run_inspection(str(world / "tied"))["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("what", ["nowhere", "./nowhere", "/nowhere/at/all"])
def test_what_is_neither_is_refused_with_what_either_holds(what):
    with pytest.raises(ModelError, match=f"{what}: neither an adapter's folder nor a model") as caught:
        run_inspection(what)
    assert "adapter_config.json" in caught.value.hint


def test_a_folder_that_holds_half_an_adapter_is_refused(adapter, tmp_path):
    config = read(adapter / "adapter_config.json")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors: no such file"):
        run_inspection(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterFileError, match="not JSON"):
        run_inspection(str(tmp_path))


def test_a_model_of_another_task_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert run_inspection(str(tmp_path))["architecture"] == "ViTModel", "as the config alone has it"
    with pytest.raises(ModelError, match="neither an adapter's folder nor a model that can be read"):
        run_inspection(str(tmp_path), "causal-lm")


@pytest.mark.parametrize("config", ['{"model_type": "llama", "hidden_size": "x"}', '{"model_type": []}', "[1]"])
def test_a_config_that_makes_no_sense_is_refused_in_a_sentence(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match="neither an adapter's folder nor a model that can be read"):
        run_inspection(str(tmp_path))


def test_code_in_a_repository_is_neither_asked_about_nor_run(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    canary = tmp_path / "canary"
    (tmp_path / "mine.py").write_text(f"open({str(canary)!r}, 'w')\n")
    own = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": own}))
    with pytest.raises(ModelError, match="code of its own, which is never run"):
        run_inspection(str(tmp_path))
    assert not asked
    assert not canary.exists()


def test_looking_at_a_model_takes_no_memory_for_its_weights(tmp_path):
    """Eight billion parameters, of which not one is made."""
    write_model(tmp_path)
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(read(tmp_path / "config.json") | large | heads))
    assert run_inspection(str(tmp_path))["parameters"] == 8_030_261_248
    assert torch.get_default_device().type == "cpu"
