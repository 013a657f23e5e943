"""mlx-lm's folder, by its definition: y + scale · (x @ lora_a) @ lora_b, one rank and one scale for all."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.errors import AdapterFileError
from tests.formats.folders import PATTERNS, convert, deltas, peft_folder
from tests.grid import relative
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapters.safetensors")


@pytest.mark.parametrize("patterns", [{}, PATTERNS])
def test_a_change_is_pefts_with_one_rank_and_one_scale(tmp_path, patterns):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head"]
    want = peft_folder(tmp_path / "peft", tiny("llama"), target_modules=targets, **patterns)
    convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    config, stored = read(tmp_path / "mlx")
    said = config["lora_parameters"]
    assert (config["fine_tune_type"], config["num_layers"], said["dropout"]) == ("lora", -1, 0.0)
    assert said["keys"] == ["lm_head", "model.embed_tokens", *(f"self_attn.{n}_proj" for n in "koqv")]
    assert {key.rsplit(".", 1)[0] for key in stored} == want.keys()
    for path, theirs in want.items():
        a, b = stored[f"{path}.lora_a"], stored[f"{path}.lora_b"]
        assert a.shape[1] == b.shape[0] == said["rank"] == (5 if patterns else 4)
        product = said["scale"] * (a.double() @ b.double())  # [I, O]
        assert relative(product if path.endswith("embed_tokens") else product.t(), theirs) < 1e-6, path


def test_there_and_back_again_is_the_same_change_in_peft(tmp_path):
    targets = ["q_proj", "v_proj", "embed_tokens"]
    want = peft_folder(tmp_path / "peft", tiny("llama"), target_modules=targets, **PATTERNS)
    convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    convert(tmp_path / "mlx", "peft", tmp_path / "back")
    got = deltas(peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "back"))
    assert got.keys() == want.keys()
    assert all(relative(got[path], want[path]) < 1e-6 for path in want)


def test_magnitudes_of_linear_layers_go_along(tmp_path):
    peft_folder(tmp_path / "peft", tiny("llama"), target_modules=["q_proj"], use_dora=True)
    convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    config, stored = read(tmp_path / "mlx")
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert config["fine_tune_type"] == "dora"
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(stored[f"{name}.m"], theirs[f"base_model.model.{name}.lora_magnitude_vector"])
    convert(tmp_path / "mlx", "peft", tmp_path / "back")
    one, other = (
        peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / which).merge_and_unload() for which in ("peft", "back")
    )
    for (path, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert relative(a, b) < 1e-6, path


def test_what_has_no_place_is_said_at_once(tmp_path):
    config = {"target_modules": ["c_attn", "wte"], "modules_to_save": ["ln_f"], "fan_in_fan_out": True}
    peft_folder(tmp_path / "peft", tiny("gpt2"), **config)
    with pytest.raises(AdapterFileError) as refused:
        convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    assert "no place for 4 parts" in refused.value.message
    assert "transformer.ln_f: a layer trained whole" in refused.value.message
    assert "transformer.h.1.attn.c_attn: mlx-lm calls the layers of this family otherwise" in refused.value.message
    tiny("llama-tied").save_pretrained(tmp_path / "tied")
    peft_folder(tmp_path / "head", tiny("llama-tied"), target_modules=["lm_head", "embed_tokens"], use_dora=True)
    with pytest.raises(AdapterFileError) as refused:
        convert(tmp_path / "head", "mlx", tmp_path / "mlx", model=str(tmp_path / "tied"))
    assert "lm_head: the head is the embedding" in refused.value.message
    assert "magnitudes mlx-lm counts by word" in refused.value.message
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("{", "not a config of mlx-lm"),
        ("[]", "not a config of mlx-lm"),
        ('{"lora_parameters": {"rank": 8}}', "not a config of mlx-lm: KeyError"),
        (
            '{"fine_tune_type": "full", "lora_parameters": {"scale": 1}}',
            "fine_tune_type 'full', scale 1.0: expected lora or dora",
        ),
    ],
)
def test_a_config_that_says_something_else_is_told(tmp_path, config, problem):
    (tmp_path / "adapter_config.json").write_text(config)
    save_file({"model.layers.0.q.lora_a": torch.ones(2, 2)}, tmp_path / "adapters.safetensors")
    with pytest.raises(AdapterFileError, match=problem):
        convert(tmp_path, "peft", tmp_path / "out")


def test_tensors_that_are_no_factors_are_listed(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": {"scale": 20.0}}')
    keys = {"model.layers.0.mlp.experts.lora_a": torch.ones(2, 2, 2), "model.norm.weight": torch.ones(2)}
    save_file(keys, tmp_path / "adapters.safetensors")
    with pytest.raises(
        AdapterFileError, match=r"2 tensors are no factors[^→]*experts.lora_a \(2, 2, 2\)\n  model.norm.weight"
    ):
        convert(tmp_path, "peft", tmp_path / "out")
