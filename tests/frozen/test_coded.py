"""Models whose linear layers are held in 8 or 4 bits: what is held, what moves, what is recognised, how it is read."""

import gc
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.starts import remainder_of
from rankwise.errors import BankError, ModelError, SpecError
from rankwise.frozen import storing
from rankwise.frozen.coded import CodedLinear, codable, hold
from rankwise.frozen.load import load_base
from rankwise.kernels.codes import coded
from rankwise.surgery.bank import Bank
from tests.grid import relative, spec, state_of, trained
from tests.jobs.world import write_model
from tests.models import ARCHITECTURES, output, tiny

CODES = pytest.mark.parametrize("code", ["int8", "nf4"])


@CODES
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "roberta", "unet"])
@torch.no_grad()
def test_every_linear_layer_but_the_head_is_held_in_codes(name, code):
    model, plain = tiny(name), tiny(name)
    layers = {path: plain.get_submodule(path) for path in codable(plain)}
    assert layers
    hold(model, code)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        assert (path in layers) == isinstance(module, CodedLinear), path
        assert module is head or type(module) not in (nn.Linear, Conv1D) or "classifier" in path, path
    for path, layer in layers.items():
        own = model.get_submodule(path)
        assert own.weight.shape == layer.weight.shape
        assert torch.equal(own.weight, coded(layer.weight, code).dense(torch.float32))
        x = torch.randn(2, 5, own.in_features)
        layer.weight.copy_(own.weight)
        torch.testing.assert_close(own(x), layer(x))
    inputs = ARCHITECTURES[name].inputs(2)
    torch.testing.assert_close(output(model, inputs), output(plain, inputs))


def test_a_layer_with_several_paths_stays_one():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model.append(model[0])
    hold(model, "nf4")
    assert model[0] is model[2]
    assert isinstance(model[0], CodedLinear)


@CODES
def test_what_is_not_in_codes_does_not_keep_the_whole_file_in_memory(code, tmp_path):
    """A view of a mapped file is a hold on all of its pages, those of the dense weights too."""
    base = load_base(write_model(tmp_path), dtype="float32", storage=code)
    gc.collect()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert base.model is not None
    assert not mapped


@CODES
def test_the_scales_keep_their_number_format_wherever_the_model_goes(code):
    layer = hold(nn.Sequential(nn.Linear(96, 32)), code)[0]
    weight = layer.weight
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight.bfloat16())
    layer.float()
    assert torch.equal(layer.weight, weight)
    assert layer.to("meta").weight.device.type == "meta"


@CODES
def test_a_base_has_one_fingerprint_in_every_storage(code):
    assert Bank(hold(tiny("gpt2"), code)).base_fingerprint == Bank(tiny("gpt2")).base_fingerprint


@CODES
@torch.no_grad()
def test_an_adapter_learnt_on_codes_is_one_of_the_dense_base(code, tmp_path):
    with Bank(hold(tiny("llama"), code)) as bank:
        trained(bank, "task", spec())
        bank.save("task", tmp_path)
        want = bank.adapter("task").digest()
    with Bank(tiny("llama")) as bank:
        bank.load("task", tmp_path)
        assert bank.adapter("task").digest() == want


def test_merging_for_good_into_codes_is_refused_and_changes_nothing():
    model = hold(tiny("llama"), "nf4")
    before = state_of(model)
    with Bank(model) as bank:
        trained(bank, "task", spec())
        with pytest.raises(BankError, match="held in nf4"):
            bank.bake("task")
    assert state_of(model) == before


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@CODES
def test_read_layer_by_layer_it_is_the_dense_model_put_in_codes(code, tmp_path, monkeypatch):
    folder = write_model(tmp_path)
    whole = []

    class Encode(storing._Encode):
        def convert(self, input_dict, model=None, **named):
            layers = [model.get_submodule(path) for path in self.storer.layers]
            whole.append(sum(layer.weight.numel() for layer in layers if layer.weight.device.type != "meta"))
            return super().convert(input_dict, model=model, **named)

    monkeypatch.setattr(storing, "_Encode", Encode)
    base = load_base(folder, dtype="bfloat16", storage=code)
    assert len(whole) > 3
    assert not any(whole), "dense weights of layers that are done are still there"
    dense = hold(load_base(folder, dtype="bfloat16").model, code)
    assert state_of(base.model)[0] == state_of(dense)[0]
    assert Bank(base.model).base_fingerprint == Bank(dense).base_fingerprint
    assert base.storage == code
    assert not getattr(base.model, "is_quantized", False), "it trains and saves as any model does"
    assert not hasattr(base.model.config, "quantization_config")


def test_a_weight_that_is_missing_is_an_error_in_codes_too(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[lost.replace("down", "up")] = torch.zeros(3, 3)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_base(folder, storage="nf4")
    assert lost in str(caught.value)
    assert f"{lost.replace('down', 'up')}: (3, 3) in the file" in str(caught.value)


# ── starts that give back what was lost ──────────────────────────────────────────────────────────────────────────────


@CODES
@pytest.mark.parametrize("form", ["lora", "dora"])
@torch.no_grad()
def test_loftq_begins_at_the_best_of_its_rank_for_what_was_lost(code, form):
    plain, model = tiny("gpt2"), hold(tiny("gpt2"), code, remainder_rank=6)
    state = state_of(model)
    with Bank(model) as bank:
        bank.add("task", spec(init="loftq", rank=4, alpha=10, form=form))
        for path, factors in bank.adapter("task").sites.items():
            kind, layer = bank.sites[path].kind, bank.sites[path].module
            lost = plain.get_submodule(path).weight.t().double() - kind.weight(layer).double()
            left = lost - (factors.applied(kind.weight(layer)).double() - kind.weight(layer).double())
            best = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
            assert float(left.norm()) == pytest.approx(float(best), rel=1e-3)
    assert state_of(model) == state


def test_loftq_needs_a_remainder_of_its_rank():
    for model, kept in ((tiny("llama"), 0), (hold(tiny("llama"), "int8", remainder_rank=2), 2)):
        with Bank(model) as bank, pytest.raises(SpecError, match=f"rank {kept} was kept"):
            bank.add("task", spec(init="loftq", rank=3))
        assert not any("adapters" in path for path, _ in model.named_modules())


def test_a_remainder_has_no_more_directions_than_there_are():
    remainder = remainder_of(torch.randn(5, 9), 64)
    assert remainder.A.shape == (5, 9)
    assert relative(remainder.B @ remainder.A, remainder.B @ remainder.A) == 0
