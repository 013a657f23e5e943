"""PEFT's trainable_token_indices, both ways, against PEFT itself."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rankwise.errors import AdapterFileError, AdapterMismatchError
from rankwise.formats.peft import read_adapter
from rankwise.surgery.bank import Bank
from tests.formats.test_peft import reconfigure, rewrite
from tests.grid import relative, spec, trained
from tests.jobs.world import write_model
from tests.models import ARCHITECTURES, VOCAB, output, tiny
from tests.surgery.test_tokens import NEW, OLD, inputs_of, lora

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["llama", "llama-tied", "gemma3", "gpt2", "gpt-neox", "opt", "qwen3", "t5"]
# What PEFT is asked for, and how many tokens the model is enlarged to before.
CASES = {
    "llama, the embedding's": ("llama", [9, 4, 7], VOCAB),
    "llama, a head's": ("llama", {"lm_head": [3]}, VOCAB),
    "llama, each its own": ("llama", {"embed_tokens": [9, 4], "lm_head": [3]}, VOCAB),
    "llama, new": ("llama", {"embed_tokens": [*NEW], "lm_head": [*NEW]}, VOCAB + 2),
    "llama, new and old": ("llama", {"embed_tokens": [98, 5, 97], "lm_head": [98, 5, 97]}, VOCAB + 2),
    "tied": ("llama-tied", [9, 4], VOCAB),
    "tied, new": ("llama-tied", [*NEW, 4], VOCAB + 2),
    "tied, both named": ("llama-tied", {"embed_tokens": [9, 4], "lm_head": [9, 4]}, VOCAB),
    "tied, each its own": ("llama-tied", {"embed_tokens": [9, 4], "lm_head": [3]}, VOCAB),
    "gpt2, new": ("gpt2", [*NEW], VOCAB + 2),
    "gemma3, new": ("gemma3", {"embed_tokens": [*NEW, 4]}, VOCAB + 2),
    "t5": ("t5", [9, 4], VOCAB),
}


def shaken(wrapped, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return wrapped.eval()


def theirs(case: str):
    name, indices, size = CASES[case]
    model = tiny(name)
    if size > VOCAB:
        model.resize_token_embeddings(size)
    wanted = {"target_modules": list(ARCHITECTURES[name].targets[:1]), "trainable_token_indices": indices}
    return name, shaken(peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **wanted))), size


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_peft_saves_does_the_same_here(case, tmp_path):
    """On the base as it is, without the rows that PEFT's model was given."""
    name, wrapped, size = theirs(case)
    inputs = inputs_of(name, new=NEW if size > VOCAB else ())
    want = output(wrapped, inputs)
    wrapped.save_pretrained(tmp_path)
    model = tiny(name)
    with Bank(model) as bank:
        bank.load("theirs", tmp_path)
        with bank.use("theirs"):
            got = output(model, inputs)
        assert relative(output(model, inputs)[..., :VOCAB], want[..., :VOCAB]) > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_is_saved_again_does_the_same_in_peft(case, tmp_path):
    name, wrapped, size = theirs(case)
    wrapped.save_pretrained(tmp_path / "theirs")
    with Bank(tiny(name)) as bank:
        bank.load("a", tmp_path / "theirs")
        bank.save("a", tmp_path / "ours")
    model = tiny(name)
    if size > VOCAB:
        model.resize_token_embeddings(size)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    inputs = inputs_of(name, new=NEW if size > VOCAB else ())
    torch.testing.assert_close(output(again, inputs), output(wrapped, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["lora", "dora"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_made_here_does_the_same_in_peft_on_a_base_that_was_enlarged(name, form, tmp_path):
    model, inputs = tiny(name), inputs_of(name)
    with Bank(model) as bank:
        trained(bank, "a", lora(name, new_tokens=NEW, trained_tokens=OLD, form=form))
        with bank.use("a"):
            want = output(model, inputs)
        bank.save("a", tmp_path)
        bank.load("again", tmp_path)
        assert bank.adapter("again").digest() == bank.adapter("a").digest()
        assert bank.adapter("again").spec.trained_tokens == tuple(sorted((*OLD, *NEW)))
    other = tiny(name)
    other.resize_token_embeddings(VOCAB + 2)
    got = output(peft.PeftModel.from_pretrained(other, tmp_path).eval(), inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_base_that_peft_stores_along_is_compared_and_rows_to_spare_come_along(tied, tmp_path):
    """Enlarged to a round number, as people do; PEFT then stores both matrices whole."""
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    plain = AutoModelForCausalLM.from_pretrained(base)
    size = plain.config.vocab_size
    plain.resize_token_embeddings(size + 6)
    new = [size, size + 1]
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": new, "lm_head": new})
    wrapped = shaken(peft.get_peft_model(plain, config))
    wrapped.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert sum(key.endswith("token_adapter.base_layer.weight") for key in stored) == 2
    ids = torch.tensor([[3, size, 5, size + 1, size + 4]])
    model = AutoModelForCausalLM.from_pretrained(base)
    with Bank(model) as bank:
        bank.load("a", tmp_path / "theirs")
        with bank.use("a"):
            torch.testing.assert_close(model(input_ids=ids).logits, wrapped(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    with Bank(model) as bank:
        rewrite(
            tmp_path / "theirs",
            lambda t: {k: v + 1 if "embed_tokens.token_adapter.base" in k else v for k, v in t.items()},
        )
        with pytest.raises(AdapterMismatchError, match="its values are others"):
            bank.load("a", tmp_path / "theirs")


@pytest.fixture
def folder(tmp_path):
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(("q_proj",), new_tokens=NEW))
        bank.save("a", tmp_path)
    return tmp_path


def test_the_format_is_pefts_to_the_letter(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [97, 98], "lm_head": [97, 98]}
    stored = load_file(folder / "adapter_model.safetensors")
    rows = {key: tuple(tensor.shape) for key, tensor in stored.items() if "lora" not in key}
    assert rows == {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 32),
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta": (2, 32),
    }
    record = json.loads((folder / "rankwise.json").read_text())
    assert record["tokens"] == config["trainable_token_indices"]
    assert record["base"]["vocabulary"] == VOCAB


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("many", "expected tokens by their numbers"),
        ([97, 97], "each once"),
        ([-1, 97], "expected tokens by their numbers"),
        ({"embed_tokens": [97, "98"]}, "expected tokens by their numbers"),
        ([], "names no token"),
        ({"embed_tokens": [97, 98]}, "lm_head: has rows of tokens, and trainable_token_indices does not name it"),
        ({"embed_tokens": [97, 98], "lm_head": [97]}, r"lm_head: rows \(2, 32\) for 1 tokens"),
        ({"embed_tokens": [97, 98], "lm_head": [97, 98], "wte": [1]}, "names 'wte', of which there are no rows"),
        (None, "lm_head: has rows of tokens"),
    ],
)
def test_a_config_that_says_other_tokens_than_there_are_rows_for_is_an_error(folder, said, complaint):
    reconfigure(folder, trainable_token_indices=said)
    with pytest.raises(AdapterFileError, match=complaint):
        read_adapter(folder)


def test_a_larger_base_than_there_is_is_asked_for_by_its_size(folder):
    reconfigure(folder, trainable_token_indices=[200, 201])
    with (
        Bank(tiny("llama")) as bank,
        pytest.raises(AdapterMismatchError, match=f"rows for {VOCAB} tokens and would need 202"),
    ):
        bank.load("a", folder, force=True)
