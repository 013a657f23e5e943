"""What vLLM takes: its rules as its source has them, and DoRA said in plain LoRA against PEFT's merged weights."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rankwise.errors import AdapterFileError, ModelError, SpecError
from rankwise.formats.vllm import max_lora_rank
from tests.formats.folders import PATTERNS, convert, deltas, peft_folder
from tests.grid import relative
from tests.jobs.world import write_model
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

# Suffixes of tensors that vLLM's from_lora_tensors and parse_fine_tuned_lora_name know.
KNOWN = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


@pytest.mark.parametrize(("most", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (100, 128), (257, 320), (512, 512)])
def test_the_next_rank_that_vllm_has_is_named(most, allowed):
    assert max_lora_rank({"a": 1, "b": most}) == allowed


def test_every_version_takes_the_same_change(tmp_path):
    """A version that knows patterns divides alpha by rank layer by layer; one that does not, the global two."""
    targets = ["q_proj", "k_proj", "v_proj", "embed_tokens"]
    want = peft_folder(tmp_path / "peft", tiny("llama"), target_modules=targets, **PATTERNS)
    found = convert(tmp_path / "peft", None, tmp_path / "out", server="vllm")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(key.endswith(KNOWN) for key in tensors)
    assert (config["bias"], config["use_dora"], config["use_rslora"], config["modules_to_save"]) == (
        "none",
        False,
        False,
        None,
    )
    assert config["lora_alpha"] / config["r"] == 1
    assert config["rank_pattern"] == config["alpha_pattern"]
    for path, theirs in want.items():
        stem = f"base_model.model.{path}.lora_" + ("embedding_{}" if path.endswith("embed_tokens") else "{}.weight")
        product = tensors[stem.format("B")] @ tensors[stem.format("A")]
        assert relative(product.t() if path.endswith("embed_tokens") else product, theirs) < 1e-6
    got = deltas(peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "out"))
    assert all(relative(got[path], want[path]) < 1e-6 for path in want)
    command = f"vllm serve MODEL --enable-lora --max-lora-rank 8 --lora-modules out={tmp_path / 'out'}"
    assert (found["to"], found["use"]) == ("peft", [command])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama")


def dora(folder, base):
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=True)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += (0.002 if "magnitude" in name else 0.2) * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 2, 32])
def test_dora_becomes_the_nearest_plain_lora_and_its_error_is_told(llama, tmp_path, rank):
    merged = dora(tmp_path / "peft", AutoModelForCausalLM.from_pretrained(llama)).merge_and_unload()
    found = convert(tmp_path / "peft", "peft", tmp_path / "out", server="vllm", model=str(llama), rank=rank)
    assert set(found["ranks"].values()) == {rank or 8}
    plain = AutoModelForCausalLM.from_pretrained(llama)
    got = deltas(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out"))
    missed = whole = 0.0
    left = dict.fromkeys((1, 8, 16), 0.0)
    for path, own in got.items():
        want = (merged.get_submodule(path).weight - plain.get_submodule(path).weight).double()
        missed += float((own - want).square().sum())
        whole += float(want.square().sum())
        values = torch.linalg.svdvals(want)
        for kept in left:
            left[kept] += float(values[kept:].square().sum())
    assert found["error"] == pytest.approx((missed / whole) ** 0.5, rel=1e-3, abs=2e-6)
    assert (found["error"] < 1e-5) == (rank == 32)
    for kept, lost in left.items():
        assert found["errors"][str(kept)] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_dora_without_its_base_cannot_be_said_otherwise(tmp_path):
    dora(tmp_path / "peft", tiny("llama"))
    with pytest.raises(ModelError, match=r"serves no DoRA[^→]*→ --model"):
        convert(tmp_path / "peft", None, tmp_path / "out", server="vllm")


def test_all_that_is_refused_is_said_at_once(tmp_path):
    config = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4]}
    peft_folder(tmp_path / "peft", tiny("llama"), **config, rank_pattern={"v_proj": 520})
    with pytest.raises(AdapterFileError) as refused:
        convert(tmp_path / "peft", None, tmp_path / "out", server="vllm")
    for problem in (
        "vLLM has no place for 4 parts",
        "lm_head: a layer trained whole, of which only classifier and score are served",
        "model.embed_tokens: rows of 2 tokens",
        "layers.1.self_attn.v_proj: rank 520, more than 512 (rankwise compress",
    ):
        assert problem in refused.value.message
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_served(tmp_path):
    peft_folder(tmp_path / "peft", tiny("roberta"), target_modules=["key"], modules_to_save=["classifier"])
    convert(tmp_path / "peft", None, tmp_path / "out", server="vllm")
    assert any(".classifier." in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_options_that_do_not_go_together_are_said_at_once(tmp_path):
    with pytest.raises(SpecError) as refused:
        convert(tmp_path, "gguf", tmp_path / "out", server="vllm", rank=600, dtype="f8", alpha=-1.0)
    for problem in ("takes folders of PEFT, not gguf", "--rank is", "no number format 'f8'", "alpha -1.0"):
        assert problem in refused.value.message
    with pytest.raises(SpecError, match="no format 'ggfu' to write; did you mean 'gguf'"):
        convert(tmp_path, "ggfu", tmp_path / "out")
    with pytest.raises(SpecError, match="to which format"):
        convert(tmp_path, None, tmp_path / "out")
    with pytest.raises(SpecError, match="no server 'lorax'"):
        convert(tmp_path, None, tmp_path / "out", server="lorax")
