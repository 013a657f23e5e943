"""A base is loaded whole and as asked for, or refused with the reason and a way out; a stranger's code never runs."""

import contextlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.errors import ModelError, RankwiseError, SpecError
from rankwise.frozen.fingerprint import fingerprint
from rankwise.frozen.load import load_base
from rankwise.frozen.precision import choose_precision
from tests.data.chat import byte_level
from tests.models import CAUSAL, tiny

WEIGHTS = "model.safetensors"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(name, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        load_base(name, **settings)
    assert caught.value.hint, "no way out"
    assert "\n" not in caught.value.hint
    return str(caught.value)


# ── what is loaded ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_architecture_comes_back_from_its_folder_to_the_bit(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    base = load_base(tmp_path, dtype="float32", device="cpu")
    assert type(base.model) is type(model)
    loaded = base.model.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[path], tensor) for path, tensor in model.state_dict().items())


def test_a_base_says_what_it_is_and_is_ready_for_use(whole):
    base = load_base(whole, dtype="float32")
    assert base.name == str(whole)
    assert base.precision.dtype == base.model.dtype == torch.float32
    assert base.model.device.type == base.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not any(module.training for module in base.model.modules())
    text = "你好, how are you?"
    assert base.tokenizer.decode(base.tokenizer(text)["input_ids"]) == text
    assert base.tokenizer.chat_template


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_the_number_format_is_the_one_asked_for(whole, wanted):
    base = load_base(whole, dtype=wanted, device="cpu")
    formats = {parameter.dtype for parameter in base.model.parameters()}
    assert formats == {base.precision.dtype} == {getattr(torch, wanted)}
    assert base.precision.reason == "asked for"
    assert base.stored == torch.float32


def test_the_number_format_is_chosen_by_the_device_where_nobody_asks(whole):
    base = load_base(whole, device="cpu")
    assert base.precision == choose_precision(torch.device("cpu"))
    assert base.model.dtype == base.precision.dtype


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_format_on_disk_is_told_whatever_it_is_loaded_as(tmp_path, stored):
    tiny("llama", stored).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    assert load_base(tmp_path, dtype="float32").stored == stored


def test_a_config_that_does_not_tell_its_format_is_taken_for_float32(copied):
    folder = copied()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    assert load_base(folder).stored == torch.float32


def test_a_folder_in_the_home_folder_may_be_written_with_a_tilde(whole, monkeypatch):
    monkeypatch.setenv("HOME", str(whole.parent))
    assert load_base(f"~/{whole.name}").name == str(whole)


def test_a_folder_named_like_a_repository_is_recorded_whole(whole, monkeypatch):
    monkeypatch.chdir(whole.parent.parent)
    named = f"{whole.parent.name}/{whole.name}"
    assert load_base(named).name == load_base(f"./{named}").name == str(whole)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere"])
def test_a_folder_that_is_not_there_is_called_so(name):
    text = refusal(name)
    assert text.startswith(f"{name}: no such folder")
    assert "config.json" in text


def test_an_id_that_cannot_be_had_offline_points_to_the_folder_and_the_hub():
    text = refusal("nobody/no-such-model")
    assert text.startswith("nobody/no-such-model: ")
    assert "folder that holds the model" in text
    assert "hub" in text


def test_a_folder_without_a_config_says_so(copied):
    folder = copied()
    (folder / "config.json").unlink()
    assert "config" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(folder)


def test_a_folder_without_weights_or_with_pickled_ones_is_refused(copied):
    folder = copied()
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in refusal(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    assert WEIGHTS in refusal(folder)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_weights_that_were_cut_short_are_refused(copied, size):
    path = copied() / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    assert "the weights cannot be loaded" in refusal(path.parent)


def test_weights_that_are_missing_or_of_another_shape_are_all_named(copied):
    """The library would go on with random numbers in their place."""
    path = copied() / WEIGHTS
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    weights["lm_head.weight"] = weights["lm_head.weight"][:5].clone()
    save_file(weights, path, {"format": "pt"})
    text = refusal(path.parent)
    for line in (
        "model.layers.1.mlp.up_proj.weight: missing",
        "model.norm.weight: missing",
        "lm_head.weight: (5, 32) in the file, (97, 32) in the model",
    ):
        assert line in text


def test_a_folder_without_a_tokenizer_says_so(copied):
    folder = copied()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    text = refusal(folder)
    assert "the tokenizer cannot be loaded" in text
    assert "the tokenizer's files" in text


@pytest.mark.parametrize("damage", ["{", "{}", '{"model": {"type": "Nope"}}', "[1]"])
def test_a_tokenizer_that_cannot_be_read_is_a_sentence_and_no_crash(copied, damage):
    folder = copied()
    (folder / "tokenizer.json").write_text(damage)
    assert "the tokenizer cannot be loaded" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "unheard-of"}, {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "unheard-of"}],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_a_sentence_and_no_crash(copied, changes):
    folder = copied()
    edit(folder, **changes)
    assert "cannot be loaded" in refusal(folder)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path):
    tiny("t5").save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    assert "T5" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "", "torch.float32"])
def test_an_unknown_number_format_lists_the_known_ones_before_anything_is_read(dtype):
    with pytest.raises(SpecError, match="bfloat16, float16, float32"):
        load_base("nobody/no-such-model", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(device):
    with pytest.raises(SpecError, match="no device") as caught:
        load_base("nobody/no-such-model", device=device)
    assert "auto, cpu" in caught.value.hint


def test_code_in_a_repository_is_never_run_not_even_when_somebody_says_yes(copied, tmp_path, monkeypatch):
    """The library would ask `Do you wish to run the custom code? [y/N]`; here it never comes to that."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    canary, folder = tmp_path / "canary", copied()
    (folder / "mine.py").write_text(f"open({str(canary)!r}, 'w')\n")
    edit(folder, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    assert "code of its own, which is never run" in refusal(folder)
    assert not asked
    assert not canary.exists()


def test_a_known_architecture_is_loaded_without_the_code_that_lies_beside(copied, tmp_path):
    canary, folder = tmp_path / "canary", copied()
    (folder / "mine.py").write_text(f"open({str(canary)!r}, 'w')\n")
    edit(folder, auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    assert type(load_base(folder).model).__name__ == "LlamaForCausalLM"
    assert not canary.exists()


def test_any_truncation_of_any_file_is_a_model_error_or_changes_nothing(whole, copied):
    """No other exception: a person who copied half a folder reads a sentence."""
    generator = np.random.default_rng(0)
    folder, want = copied(), fingerprint(load_base(whole).model.named_parameters())
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for size in generator.integers(len(data), size=4).tolist():
            path.write_bytes(data[:size])
            with contextlib.suppress(RankwiseError):
                assert fingerprint(load_base(folder).model.named_parameters()) == want, path
        path.write_bytes(data)
    assert fingerprint(load_base(folder).model.named_parameters()) == want
