"""Kohya's files, read by diffusers, which takes them too."""

import json

import peft
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from rankwise.errors import AdapterFileError, ModelError
from tests.formats.folders import convert, deltas, peft_folder, unet
from tests.formats.test_diffusers import CASES, TARGETS, check, loaded
from tests.grid import relative
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and PEFT's


def text_encoder():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "projection_dim": 16}
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()


def without_paths(file):
    """As another tool would have written it: nothing but tensors."""
    save_file(load_file(file), file)


@pytest.mark.parametrize("case", CASES)
def test_diffusers_loads_what_is_written(tmp_path, case):
    want = peft_folder(tmp_path / "peft", unet(), target_modules=TARGETS, **CASES[case])
    convert(tmp_path / "peft", "kohya", tmp_path / "a.safetensors")
    check(loaded(tmp_path / "a.safetensors"), want)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_again_is_the_same_change_in_peft(tmp_path, case, kept):
    want = peft_folder(tmp_path / "peft", unet(), target_modules=TARGETS, **CASES[case])
    convert(tmp_path / "peft", "kohya", tmp_path / "a.safetensors")
    if not kept:
        without_paths(tmp_path / "a.safetensors")
    found = convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    assert found["component"] == "unet"
    check(deltas(peft.PeftModel.from_pretrained(unet(), tmp_path / "back")), want)


def test_a_text_encoder_is_called_as_diffusers_expects(tmp_path):
    targets = ["q_proj", "out_proj", "fc1"]
    want = peft_folder(tmp_path / "peft", text_encoder(), target_modules=targets, lora_alpha=2)
    convert(tmp_path / "peft", "kohya", tmp_path / "a.safetensors", component="text_encoder")
    stored = load_file(tmp_path / "a.safetensors")
    theirs, alphas = _convert_non_diffusers_lora_to_diffusers(dict(stored))
    assert len(theirs) == 2 * len(want)
    assert list(alphas.values()) == [2.0] * 6
    name = next(key for key in stored if key.endswith("layers_0_mlp_fc1.lora_down.weight"))
    product = stored[name.replace("down", "up")] @ stored[name]
    assert relative(0.5 * product, next(w for path, w in want.items() if path.endswith("layers.0.mlp.fc1"))) < 1e-6
    without_paths(tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    check(deltas(peft.PeftModel.from_pretrained(text_encoder(), tmp_path / "back")), want)


@pytest.mark.parametrize("of_pipeline", [True, False])
def test_the_model_tells_what_the_words_do_not(tmp_path, of_pipeline):
    folder = tmp_path / "pipeline"
    unet().save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text("{}")
    keys = {
        "lora_unet_time_embedding_linear_1.lora_down.weight": torch.randn(2, 8),
        "lora_unet_time_embedding_linear_1.lora_up.weight": torch.randn(32, 2),
        "lora_unet_time_embedding_linear_1.alpha": torch.tensor(0.0),  # which means the rank
    }
    save_file(keys, tmp_path / "a.safetensors")
    model = folder if of_pipeline else folder / "unet"
    convert(tmp_path / "a.safetensors", "peft", tmp_path / "back", model=str(model), component="unet")
    got = deltas(peft.PeftModel.from_pretrained(unet(), tmp_path / "back"))
    down, up, _ = keys.values()
    check(got, {"time_embedding.linear_1": up @ down})
    with pytest.raises(ModelError, match="a pipeline of several models"):
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "no", model=str(folder))


def test_names_that_nobody_knows_are_listed_with_a_way_out(tmp_path):
    keys = {
        f"lora_unet_{n}.lora_{w}.weight": torch.ones(2, 2)
        for n in ("some_layer", "mid_block_x")
        for w in ("down", "up")
    }
    save_file(keys, tmp_path / "a.safetensors")
    with pytest.raises(
        AdapterFileError, match=r"paths of 2 layers[^→]*mid_block_x: no known[^→]*some_layer: no[^→]*→ .*--model"
    ):
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    keys = {f"lora_unet_input_blocks_4_1_proj_in.lora_{way}.weight": torch.ones(2, 2) for way in ("down", "up")}
    save_file(keys, tmp_path / "b.safetensors")
    with pytest.raises(AdapterFileError, match="names of the original UNet"):
        convert(tmp_path / "b.safetensors", "peft", tmp_path / "back")


def test_other_factors_are_told_of(tmp_path):
    keys = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 2),
        "lora_unet_conv_in.lora_up.weight": torch.ones(2, 2),
    }
    odd = ("lora_mid.weight", "dora_scale", "hada_w1_a", "lokr_w1")
    save_file(keys | {f"lora_unet_conv_in.{end}": torch.ones(2) for end in odd}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="4 tensors are not plain factors") as refused:
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    assert all(end in refused.value.message for end in odd)


def test_ranks_and_alphas_are_said_in_kohyas_words(tmp_path):
    peft_folder(tmp_path / "peft", unet(), target_modules=TARGETS)
    convert(tmp_path / "peft", "kohya", tmp_path / "a.safetensors", dtype="bf16")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_network_module"]) == ("4", "6", "networks.lora")
    assert set(json.loads(said["rankwise.paths"]).values()) == set(deltas_of(tmp_path / "peft"))
    kinds = {key.split(".", 1)[1]: tensor.dtype for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    assert kinds == {"lora_down.weight": torch.bfloat16, "lora_up.weight": torch.bfloat16, "alpha": torch.float32}


def deltas_of(folder):
    return deltas(peft.PeftModel.from_pretrained(unet(), folder))


def test_what_has_no_place_is_said_at_once(tmp_path):
    peft_folder(tmp_path / "peft", tiny("llama"), target_modules=["q_proj", "embed_tokens"], use_dora=True)
    with pytest.raises(AdapterFileError) as refused:
        convert(tmp_path / "peft", "kohya", tmp_path / "a.safetensors", component="transformer")
    for problem in (
        "magnitudes of 3 layers",
        "model.embed_tokens: an embedding",
        "transformer: its layers have other names",
    ):
        assert problem in refused.value.message
