"""The scripts of examples/ run and find what they say they find; PEFT reads what they write."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from rankwise.surgery.bank import Bank
from tests.grid import relative, spec, state_of, trained
from tests.jobs.world import write_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_example_is_tried_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"diffusion_unet", "detector", "many_tasks"}


def test_the_denoiser_of_squares_learns_discs(tmp_path, capsys):
    found = example("diffusion_unet").main(tmp_path, base_steps=60, steps=40)
    assert found["disc"].high < 0
    assert found["square"].mean > found["disc"].mean
    assert "the base is what it was, to the bit" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_finder_of_squares_and_discs_learns_crosses(tmp_path, capsys):
    found = example("detector").main(tmp_path, base_steps=80, steps=40)
    assert found.high < -1
    assert "the base is what it was, to the bit" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_four_tasks_stand_on_one_base_and_each_adapter_is_best_at_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "model")
    says = {
        "double": lambda n: f"that is {2 * n}",
        "names": lambda n: "green " * 3,
        "count": lambda n: "one, two, three",
    }
    says["square"] = lambda n: "no idea at all"
    files = {}
    for name, answer in says.items():
        rows = [{"prompt": f"what is {n} and {n}?", "completion": answer(n)} for n in range(100, 140)]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {name: str(file) for name, file in files.items()}
    losses = example("many_tasks").main(str(tmp_path / "model"), files, tmp_path / "out", dtype="float32", device="cpu")
    for task, found in losses.items():
        assert min(found, key=found.__getitem__) == task
        assert found[task] < found["base"] - 0.5
    told = capsys.readouterr().out
    assert "(as alone)" in told
    assert "0.7 · double + 0.3 · names" in told
    assert "the base is what it was, to the bit" in told
    assert all((tmp_path / "out" / name / "adapter_model.safetensors").exists() for name in files)


# ── the same adapters in PEFT ────────────────────────────────────────────────────────────────────────────────────────


def conditioned() -> UNet2DConditionModel:
    """The class of Stable Diffusion's UNet: attention to a text beside attention to itself, linear projections."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def noisy(channels: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, size, size, generator=generator), torch.tensor([3, 70])


@pytest.mark.parametrize("form", ["lora", "dora"])
@pytest.mark.parametrize("which", ["diffusion_unet", "conditioned", "detector"])
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@torch.no_grad()
def test_peft_reads_what_is_written_for_it(which, form, tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        made = {"diffusion_unet": "unet", "detector": "yolos"}
        return (conditioned() if which == "conditioned" else getattr(example(which), made[which])()).eval()

    def answer(model: nn.Module) -> list[torch.Tensor]:
        if which == "detector":
            out = model(pixel_values=example("detector").scenes((0, 1, 2), 4, seed=0)[0])
            return [out.logits, out.pred_boxes]
        text = {"encoder_hidden_states": torch.ones(2, 5, 12)} if which == "conditioned" else {}
        return [model(*noisy(*((2, 8) if which == "conditioned" else (1, 16))), **text).sample]

    convolutional = {"targets": example("diffusion_unet").ADAPTED}
    headed = {"targets": "all-linear", "modules_to_save": ("class_labels_classifier",)}
    model = build()
    before = state_of(model)
    with Bank(model) as bank:
        trained(bank, "task", spec(**(headed if which == "detector" else convolutional), form=form), size=0.1)
        with bank.use("task"):
            want = answer(model)
        bank.save("task", tmp_path)
        bank.merge("task")
        for got, own in zip(answer(model), want, strict=True):
            assert relative(got, own) < 1e-5
    assert state_of(model) == before
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    for got, own, bare in zip(answer(theirs), want, answer(build()), strict=True):
        torch.testing.assert_close(got, own, rtol=1e-5, atol=1e-5)
        assert relative(bare, own) > 1e-3
