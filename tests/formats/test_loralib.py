"""loralib's checkpoints: its layout written here by hand, its change computed by the grouped convolution it uses."""

import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from rankwise.errors import AdapterFileError, SpecError
from tests.formats.folders import convert, deltas
from tests.grid import relative
from tests.models import TASKS, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

RANK, ALPHA = 3, 12.0


def merged_change(A, B, enable):
    """ΔW `[O, I]` of loralib's MergedLinear: A is the picture, B the 1 × 1 kernels of one group for each part."""
    product = F.conv1d(A[None], B[..., None], groups=sum(enable))[0]
    parts = iter(product.chunk(sum(enable)))
    zeros = torch.zeros(len(product) // sum(enable), A.shape[1])
    return ALPHA / RANK * torch.cat([next(parts) if on else zeros for on in enable])


def gpt2_state(enable=(True, False, True)):
    torch.manual_seed(0)
    return {
        f"transformer.h.{i}.attn.c_attn.lora_{letter}": torch.randn(shape)
        for i in (0, 1)
        for letter, shape in (("A", (RANK * sum(enable), 32)), ("B", (32 * sum(enable), RANK)))
    }


@pytest.mark.parametrize("way", ["pt", "bin", "nested", "parallel", "safetensors"])
def test_gpt2s_merged_layers_become_pefts(tmp_path, way):
    state = gpt2_state()
    file = tmp_path / f"gpt2.{way if way in ('bin', 'safetensors') else 'pt'}"
    if way == "safetensors":
        save_file(state, file)
    elif way == "nested":
        torch.save({"model_state_dict": state}, file)
    else:
        torch.save({f"module.{k}": v for k, v in state.items()} if way == "parallel" else state, file)
    found = convert(file, "peft", tmp_path / "peft", alpha=ALPHA)
    assert found["from"] == "loralib"
    assert found["notes"] == [
        "2 merged layers: taken as enable_lora=[True, False, True], which the file does not say (--enable-lora)"
    ]
    got = deltas(peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "peft"))
    for i in (0, 1):
        A, B = (state[f"transformer.h.{i}.attn.c_attn.lora_{letter}"] for letter in "AB")
        want = merged_change(A, B, (True, False, True))
        assert not want[32:64].any()
        assert relative(got[f"transformer.h.{i}.attn.c_attn"].t(), want) < 1e-6  # Conv1D has [I, O]


@pytest.mark.parametrize("enable", [(True, True, False), (True, True, True), (False, False, True)])
def test_which_parts_are_changed_can_be_said(tmp_path, enable):
    torch.save(gpt2_state(enable), tmp_path / "a.pt")
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    asked = {"alpha": ALPHA, "enable_lora": enable, "model": str(tmp_path / "gpt2")}
    assert convert(tmp_path / "a.pt", "peft", tmp_path / "peft", **asked)["notes"] == []
    got = deltas(peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "peft"))
    A, B = (gpt2_state(enable)[f"transformer.h.1.attn.c_attn.lora_{letter}"] for letter in "AB")
    assert relative(got["transformer.h.1.attn.c_attn"].t(), merged_change(A, B, enable)) < 1e-6


def test_one_part_that_nobody_names_is_not_guessed(tmp_path):
    torch.save(gpt2_state((True, False, False)), tmp_path / "a.pt")
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(AdapterFileError, match=r"h\.0\.attn\.c_attn: has 32 of 96 outputs; --enable-lora says which"):
        convert(tmp_path / "a.pt", "peft", tmp_path / "peft", alpha=ALPHA, model=str(tmp_path / "gpt2"))
    torch.save(gpt2_state(), tmp_path / "b.pt")
    with pytest.raises(AdapterFileError, match=r"2 matrices in one, of which enable_lora=.* has 1"):
        convert(tmp_path / "b.pt", "peft", tmp_path / "peft", alpha=ALPHA, enable_lora=(True, False, False))


def test_a_classifier_that_was_trained_along_is_trained_whole(tmp_path):
    """The layout of the published roberta_base_lora_mnli.bin."""
    build, _ = TASKS["sequence-classification"]["roberta"]
    torch.manual_seed(0)
    model = build()
    layers = [f"roberta.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]
    state = {f"{layer}.lora_{w}": torch.randn(s) for layer in layers for w, s in (("A", (RANK, 32)), ("B", (32, RANK)))}
    head = {name: torch.randn(p.shape) for name, p in model.named_parameters() if name.startswith("classifier.")}
    torch.save({**state, **head}, tmp_path / "a.bin")
    convert(tmp_path / "a.bin", "peft", tmp_path / "peft", alpha=ALPHA)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    got = deltas(wrapped)
    assert got.keys() == set(layers)
    for layer in layers:
        want = ALPHA / RANK * state[f"{layer}.lora_B"] @ state[f"{layer}.lora_A"]
        assert relative(got[layer], want) < 1e-6
    merged = dict(wrapped.merge_and_unload().named_parameters())
    assert all(torch.equal(merged[name], head[name]) for name in head)


def test_biases_and_halves_are_listed_and_alpha_is_asked_for(tmp_path):
    state = gpt2_state() | {"transformer.h.0.attn.c_attn.bias": torch.ones(96)}
    del state["transformer.h.1.attn.c_attn.lora_B"]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(SpecError, match="do not say their alpha\n  → --alpha"):
        convert(tmp_path / "a.pt", "peft", tmp_path / "peft")
    with pytest.raises(AdapterFileError) as refused:
        convert(tmp_path / "a.pt", "peft", tmp_path / "peft", alpha=ALPHA)
    assert "h.1.attn.c_attn: has lora_A only" in refused.value.message
    assert "h.0.attn.c_attn.bias: trained beside the factors" in refused.value.message


class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_what_would_run_when_it_is_read_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, bad in (("evil.pt", Evil()), ("list.pt", [1, 2])):
        torch.save(bad, tmp_path / name)
        with pytest.raises(AdapterFileError, match=r"not a (checkpoint of tensors alone|state dict of tensors)"):
            convert(tmp_path / name, "peft", tmp_path / "out", alpha=1)
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "noise.bin").write_bytes(b"\x00\x01noise" * 9)
    (tmp_path / "none.bin").write_bytes(b"")
    for name in ("raw.bin", "noise.bin", "none.bin"):
        with pytest.raises(AdapterFileError, match="not a checkpoint of tensors alone"):
            convert(tmp_path / name, "peft", tmp_path / "out", alpha=1)
    assert not (tmp_path / "ran").exists()
