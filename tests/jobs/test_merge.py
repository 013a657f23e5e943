import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.errors import AdapterFileError, AdapterMismatchError, MergeError, RunFolderError
from rankwise.frozen.load import load_base
from rankwise.jobs.merge import PROMPTS, TOLERANCE, run_merge
from rankwise.jobs.watch import Quiet
from rankwise.surgery.bank import Bank
from tests.grid import relative
from tests.jobs.world import read, write_adapter, write_model


def merged(model, adapter, out, **settings):
    return run_merge(str(model), adapter, out, Quiet(), **settings)


@torch.no_grad()
def logits(model, texts=PROMPTS):
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [plain(input_ids=torch.tensor([tokenizer.encode(text)])).logits for text in texts]


@torch.no_grad()
def logits_of_both(model, adapter, texts=PROMPTS):
    base = load_base(model, dtype="float32")
    with Bank(base.model) as bank:
        bank.load("a", adapter)
        with bank.use("a"):
            return [bank.model(input_ids=torch.tensor([base.tokenizer.encode(text)])).logits for text in texts]


def worst(got, want):
    return max(relative(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_merged_folder_is_an_ordinary_model_that_says_what_base_and_adapter_say(tmp_path, family, dtype):
    base = write_model(tmp_path / "base", family, dtype=dtype)
    adapter = write_adapter(tmp_path / "adapter", base, size=0.1)
    found = merged(base, adapter, tmp_path / "out")
    error = worst(logits(tmp_path / "out"), logits_of_both(base, adapter))
    assert error == pytest.approx(found["logits_error"], abs=1e-6)
    assert error <= found["tolerance"] == TOLERANCE[dtype]
    assert worst(logits(tmp_path / "out"), logits(base)) > 3 * found["tolerance"]  # it did change something
    assert found["dtype"] == str(dtype).removeprefix("torch.")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_the_tolerances_leave_what_was_measured_some_room_and_no_more(tmp_path):
    """Rounding to eight bits must fit in, and half of an adapter as small as one hundredth must not."""
    base = write_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base, size=0.02)
    error = merged(base, adapter, tmp_path / "out")["logits_error"]
    assert 1e-3 < error < TOLERANCE[torch.bfloat16] / 2
    assert TOLERANCE[torch.bfloat16] < 0.5 * worst(logits_of_both(base, adapter), logits(base))


def test_a_tied_head_stays_tied_where_nothing_touches_it(world, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", world / "tied")
    merged(world / "tied", adapter, tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens", "q_proj")])
def test_tied_embeddings_of_which_one_is_changed_come_apart_and_are_said_to(world, tmp_path, targets):
    adapter = write_adapter(tmp_path / "adapter", world / "tied", targets=targets)
    merged(world / "tied", adapter, tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    assert worst(logits(tmp_path / "out"), logits_of_both(world / "tied", adapter)) < 2e-5


def test_layers_trained_whole_are_merged_too(world, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", world / "llama", targets=("q_proj",), modules_to_save=("norm",))
    merged(world / "llama", adapter, tmp_path / "out")
    assert worst(logits(tmp_path / "out"), logits_of_both(world / "llama", adapter)) < 2e-5
    before, after = (load_file(place / "model.safetensors") for place in (world / "llama", tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {re.sub(r"\d", "0", name) for name in changed} == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    }


def test_a_new_folder_is_made_where_there_was_none_and_an_empty_one_taken(world, adapter, tmp_path):
    assert merged(world / "llama", adapter, tmp_path / "a" / "b")["out"] == str(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    merged(world / "llama", adapter, tmp_path / "empty")
    for out in (tmp_path / "a" / "b", tmp_path / "empty"):
        assert (out / "config.json").exists()
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir())  # others can read it


# ── what is refused leaves nothing behind ────────────────────────────────────────────────────────────────────────────


def test_what_is_there_is_never_overwritten(world, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(RunFolderError, match="nothing was overwritten"):
            merged(world / "llama", adapter, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_merge_that_fails_leaves_no_half_model(world, adapter, tmp_path):
    with pytest.raises(AdapterFileError):
        merged(world / "llama", tmp_path / "none", tmp_path / "out")
    with pytest.raises(AdapterMismatchError):
        merged(world / "tied", adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        merged(world / "llama", adapter, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_that_fails_the_proof_is_not_handed_over(tmp_path):
    """The merged head holds numbers that float16 has no place for: what is written is not what was merged."""
    base = write_model(tmp_path / "base", dtype=torch.float16)
    adapter = write_adapter(tmp_path / "adapter", base, size=1e3, targets=("lm_head",))
    with pytest.raises(MergeError, match=r"logits are off by (nan|inf), at most 0.004 was expected") as caught:
        merged(base, adapter, tmp_path / "out")
    assert "float32" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_force_merges_onto_another_base(world, adapter, tmp_path):
    merged(world / "tied", adapter, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").exists()
