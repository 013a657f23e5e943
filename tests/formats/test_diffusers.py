"""Files of diffusion pipelines, read by diffusers' own loader and written by its own converters."""

import json

import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

from rankwise.errors import AdapterFileError
from tests.formats.folders import PATTERNS, convert, deltas, peft_folder, unet
from tests.grid import relative

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and PEFT's

TARGETS = ["to_q", "to_k", "to_out.0", "conv1", "conv_shortcut", "proj_in"]
CASES = {
    "plain": {},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"to_q": 2, r".*up_blocks.*\.conv1": 5},
        "alpha_pattern": {r".*down_blocks.*to_k": 9},
    },
}


def loaded(file):
    """ΔW of a UNet into which diffusers has loaded the file."""
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(str(file), return_lora_metadata=True)
    model = unet()
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, model, adapter_name="a", metadata=metadata)
    return deltas(model)


def check(got, want):
    assert got.keys() == want.keys()
    for path in want:
        assert relative(got[path], want[path]) < 1e-6, path


@pytest.mark.parametrize("case", CASES)
def test_diffusers_loads_what_is_written(tmp_path, case):
    want = peft_folder(tmp_path / "peft", unet(), target_modules=TARGETS, **CASES[case])
    found = convert(tmp_path / "peft", "diffusers", tmp_path / "a.safetensors")
    assert (found["component"], found["layers"]) == ("unet", len(want))
    assert all(key.startswith("unet.") for key in load_file(tmp_path / "a.safetensors"))
    check(loaded(tmp_path / "a.safetensors"), want)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_again_is_the_same_change_in_peft(tmp_path, case):
    want = peft_folder(tmp_path / "peft", unet(), target_modules=TARGETS, **CASES[case])
    convert(tmp_path / "peft", "diffusers", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    check(deltas(peft.PeftModel.from_pretrained(unet(), tmp_path / "back")), want)


def test_magnitudes_go_along(tmp_path):
    model = peft.get_peft_model(unet(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", "diffusers", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    back = peft.PeftModel.from_pretrained(unet(), tmp_path / "back").merge_and_unload()
    want = model.merge_and_unload()
    for (name, a), (_, b) in zip(back.named_parameters(), want.named_parameters(), strict=True):
        assert relative(a, b) < 1e-6, name


@pytest.mark.parametrize("spelling", ["today", "lora.down", "processor", "with alphas", "with metadata"])
def test_every_spelling_of_diffusers_is_read(tmp_path, spelling):
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    A, B = torch.randn(3, 16), torch.randn(16, 3)
    keys = {f"{layer}.to_q.lora_A.weight": A, f"{layer}.to_out.0.lora_A.weight": A}
    keys |= {key.replace("lora_A", "lora_B"): B for key in keys}
    metadata, scale = None, 1.0
    if spelling == "lora.down":
        keys = convert_state_dict_to_diffusers(keys)
        assert f"{layer}.to_q.lora.down.weight" in keys
    if spelling == "processor":
        keys = {
            f"{layer}.processor.to_{n}_lora.{w}.weight": t for n in ("q", "out") for w, t in (("down", A), ("up", B))
        }
    if spelling == "with alphas":
        keys |= {f"{layer}.to_q.alpha": torch.tensor(6.0), f"{layer}.to_out.0.alpha": torch.tensor(6.0)}
        scale = 2.0
    if spelling == "with metadata":
        said = {"r": 9, "lora_alpha": 12, "rank_pattern": {layer + r"\..*": 3}, "use_rslora": False}
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in said.items()})}
        scale = 4.0
    save_file({f"unet.{key}": value.clone() for key, value in keys.items()}, tmp_path / "a.safetensors", metadata)
    convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    got = deltas(peft.PeftModel.from_pretrained(unet(), tmp_path / "back"))
    check(got, dict.fromkeys((f"{layer}.to_q", f"{layer}.to_out.0"), scale * B @ A))


def test_the_layers_of_a_text_encoder_had_other_names(tmp_path):
    keys = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.to_{name}_lora.{way}.weight": torch.ones(2, 2)
        for name in ("q", "out")
        for way in ("down", "up")
    }
    save_file(keys, tmp_path / "a.safetensors")
    found = convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    assert [path.split("self_attn.")[1] for path in found["ranks"]] == ["out_proj", "q_proj"]


def test_a_file_for_two_models_is_taken_one_by_one(tmp_path):
    keys = {f"{part}.conv_in.lora_{way}.weight": torch.ones(2, 2) for part in ("unet", "transformer") for way in "AB"}
    save_file(keys, tmp_path / "a.safetensors")
    with pytest.raises(
        AdapterFileError, match=r"layers of transformer \(1 layers\), unet \(1 layers\); a folder is for one"
    ):
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    found = convert(tmp_path / "a.safetensors", "peft", tmp_path / "back", component="unet")
    assert (found["component"], found["layers"]) == ("unet", 1)
    with pytest.raises(AdapterFileError, match="none of text_encoder"):
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "no", component="text_encoder")


def test_what_is_no_factor_is_listed(tmp_path):
    keys = {f"unet.conv_in.lora_{way}.weight": torch.ones(2, 2) for way in "AB"}
    keys |= {"unet.conv_in.lora_B.bias": torch.ones(2), "unet.norm.weight": torch.ones(2)}
    save_file(keys, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"2 tensors are no factors[^→]*lora_B.bias\n  unet.norm.weight"):
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")
    save_file(
        {f"unet.conv_in.lora_{w}.weight": torch.ones(s) for w, s in (("A", (2, 3)), ("B", (4, 1)))},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(AdapterFileError, match=r"conv_in: A \(2, 3\) and B \(4, 1\) are not two factors"):
        convert(tmp_path / "b.safetensors", "peft", tmp_path / "back")


def test_metadata_that_lies_is_told(tmp_path):
    keys = {f"unet.conv_in.lora_{way}.weight": torch.ones(2, 2) for way in "AB"}
    for said, problem in (
        ('{"unet.r": 3}', "conv_in: rank 2, 3 by its metadata"),
        ("[", "cannot be read"),
        ("[1]", "cannot be"),
    ):
        save_file(keys, tmp_path / "a.safetensors", {"lora_adapter_metadata": said})
        with pytest.raises(AdapterFileError, match=problem):
            convert(tmp_path / "a.safetensors", "peft", tmp_path / "back")


def test_a_language_models_adapter_needs_to_be_told_for_what(tmp_path):
    peft_folder(tmp_path / "peft", torch.nn.Sequential(torch.nn.Linear(4, 4)), target_modules=["0"], **{**PATTERNS})
    with pytest.raises(AdapterFileError, match=r"names the model of a pipeline[^→]*\n  → --component, one of unet"):
        convert(tmp_path / "peft", "diffusers", tmp_path / "a.safetensors")
    convert(tmp_path / "peft", "diffusers", tmp_path / "a.safetensors", component="transformer")
    assert set(load_file(tmp_path / "a.safetensors")) == {f"transformer.0.lora_{way}.weight" for way in "AB"}
