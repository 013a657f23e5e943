"""Adapters from one format to another, from files to files: what is kept, what is said, what is left behind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.errors import AdapterFileError, ModelError, RunFolderError, SpecError
from rankwise.formats.peft import read_adapter
from rankwise.frozen.load import load_base
from rankwise.jobs.convert import Conversion, outline_of, run_conversion
from rankwise.jobs.inspect import run_inspection
from rankwise.jobs.merge import run_merge
from rankwise.jobs.watch import Quiet
from rankwise.surgery.bank import Bank
from tests.grid import relative
from tests.jobs.world import Listener, read, write_adapter

PROMPT = torch.tensor([[5, 17, 99, 300, 42, 8]])


def convert(source, to, out, watch=None, **asked):
    return run_conversion(source, to, out, watch or Quiet(), Conversion(**asked))


@torch.no_grad()
def logits_with(world, folder):
    with Bank(load_base(world / "llama", dtype="float32").model) as bank:
        bank.load("a", folder)
        with bank.use("a"):
            return bank.model(input_ids=PROMPT).logits


def test_a_record_goes_along_with_what_is_now_true(world, adapter, tmp_path):
    found = convert(adapter, None, tmp_path / "out", server="vllm")
    before, after = (read(folder / "rankwise.json") for folder in (adapter, tmp_path / "out"))
    assert after["base"] == before["base"]
    assert after["digest"] == read_adapter(tmp_path / "out").digest() != before["digest"]
    assert (
        {site["scale"] for site in after["sites"].values()} == {1.0} != {s["scale"] for s in before["sites"].values()}
    )
    assert relative(logits_with(world, tmp_path / "out"), logits_with(world, adapter)) < 1e-5
    assert run_merge(str(world / "llama"), tmp_path / "out", tmp_path / "merged", Quiet())["layers"] == found["layers"]


def test_what_is_found_can_be_printed_and_what_was_done_is_told(world, adapter, tmp_path):
    told = Listener()
    found = convert(adapter, "gguf", tmp_path / "a.gguf", told, model=str(world / "llama"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["from"], found["to"], found["for"], found["notes"]) == ("peft", "gguf", None, [])
    assert found["parameters"] == run_inspection(str(adapter))["parameters"]
    assert found["use"][0] == f"llama-cli -m MODEL.gguf --lora {tmp_path / 'a.gguf'}"
    assert told.stages == [f"reading {adapter}", f"writing {tmp_path / 'a.gguf'}"]
    assert found["error"] < 1e-7
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_residual_start_is_written_plain(world, tmp_path):
    source = write_adapter(tmp_path / "pissa", world / "llama", init="pissa", targets=("v_proj",))
    found = convert(source, "mlx", tmp_path / "mlx")
    assert set(found["ranks"].values()) == {8}
    convert(tmp_path / "mlx", "peft", tmp_path / "back")
    assert relative(logits_with(world, tmp_path / "back"), logits_with(world, source)) < 1e-5


@pytest.mark.parametrize(("to", "out"), [("gguf", "a.gguf"), ("mlx", "mlx"), ("peft", "peft")])
def test_nothing_is_overwritten_and_nothing_half_done_is_left(world, adapter, tmp_path, to, out):
    convert(adapter, to, tmp_path / out, model=str(world / "llama"))
    with pytest.raises(RunFolderError, match="nothing was overwritten"):
        convert(adapter, to, tmp_path / out, model=str(world / "llama"))
    big = tmp_path / "big"
    big.mkdir()
    for name in ("adapter_config.json", "rankwise.json"):
        (big / name).write_bytes((adapter / name).read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 1e6 * tensor for name, tensor in tensors.items()}, big / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="not finite"):
        convert(big, to, tmp_path / f"half-{out}", model=str(world / "llama"), dtype="f16")
    save_file({name: 1e-7 * tensor for name, tensor in tensors.items()}, big / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"read back, ΔW is off by .*\n  → --dtype f32"):
        convert(big, to, tmp_path / f"half-{out}", model=str(world / "llama"), dtype="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out, "big"])


def test_a_file_is_called_as_its_format_wants_it(adapter, tmp_path):
    with pytest.raises(SpecError, match=r"a file of gguf ends in \.gguf\n  → --out NAME\.gguf"):
        convert(adapter, "gguf", tmp_path / "a.bin")
    with pytest.raises(SpecError, match="no component 'unte'; did you mean 'unet'"):
        convert(adapter, "kohya", tmp_path / "a.safetensors", component="unte")


def test_a_model_that_cannot_be_read_is_told(adapter, tmp_path):
    with pytest.raises(ModelError):
        convert(adapter, "gguf", tmp_path / "a.gguf", model=str(tmp_path / "nowhere"))
    assert not list(tmp_path.iterdir())


def test_an_outline_knows_kinds_shapes_and_ties(world):
    tied, plain = outline_of(str(world / "tied")), outline_of(str(world / "gpt2"))
    assert (tied.family, tied.tied, plain.family, plain.tied) == ("llama", True, "gpt2", True)
    assert plain.layers["transformer.h.0.attn.c_attn"].kind == "conv1d-linear"
    assert plain.layers["transformer.wte"].kind == "embedding"
    assert plain.layers["transformer.h.0.attn.c_attn"].shape.outputs == 96


def test_what_changes_nothing_more_and_what_has_no_factors(world, adapter, tmp_path):
    """AdaLoRA that was pruned to nothing, as PEFT's folders say it; and a classifier alone."""
    config = read(adapter / "adapter_config.json")
    for name in ("none", "head"):
        (tmp_path / name).mkdir()
    path = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{path}{x}": torch.zeros(s) for x, s in (("A", (0, 4)), ("B", (4, 0)), ("E", (0, 1)))},
        tmp_path / "none" / "adapter_model.safetensors",
    )
    adalora = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "none" / "adapter_config.json").write_text(json.dumps(adalora))
    with pytest.raises(AdapterFileError, match=r"holds no tensor|nothing to convert"):
        convert(tmp_path / "none", "mlx", tmp_path / "mlx")
    head = config | {"modules_to_save": ["score"], "rank_pattern": {}, "alpha_pattern": {}}
    save_file({"base_model.model.score.weight": torch.ones(2, 4)}, tmp_path / "head" / "adapter_model.safetensors")
    (tmp_path / "head" / "adapter_config.json").write_text(json.dumps(head))
    found = convert(tmp_path / "head", None, tmp_path / "out", server="vllm")
    assert (found["layers"], found["parameters"], found["error"]) == (0, 8, 0)
    with pytest.raises(AdapterFileError, match="1 part of this adapter:\n  score: a layer trained whole"):
        convert(tmp_path / "head", "mlx", tmp_path / "mlx")
