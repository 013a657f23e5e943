"""transformers' Trainer on a model that holds a bank: what PEFT gives there is given here, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from rankwise.surgery.bank import Bank
from tests.grid import spec, state_of, trained
from tests.integration.course import SHORT, documents, moved, padded, recording, sentences, state
from tests.models import output, tiny, words

Trainer = recording(hf.Trainer)
CASES: dict[str, dict[str, Any]] = {
    "llama": {"targets": "all-linear"},
    "llama-dora": {"targets": "attention", "form": "dora", "scaling": "alpha/sqrt(r)"},
    "llama-tied": {"targets": ("q_proj", "embed_tokens")},
    "gpt2": {"targets": ("c_attn", "c_fc")},  # whose base has dropout, which both sides draw alike
    "roberta": {"targets": ("query", "value"), "modules_to_save": ("classifier",)},
}


def course(model: nn.Module, folder: Path, **settings: Any) -> Any:
    arguments = hf.TrainingArguments(output_dir=str(folder), **{**SHORT, **settings})
    classifies = "SequenceClassification" in type(getattr(model, "base_model", model)).__name__ + type(model).__name__
    rows: Any = (
        {"train_dataset": sentences()} if classifies else {"train_dataset": documents(), "data_collator": padded}
    )
    return Trainer(model=model, args=arguments, eval_dataset=rows["train_dataset"], **rows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_a_run_is_the_run_of_peft(case, tmp_path):
    name = case.removesuffix("-dora")
    with Bank(tiny(name)) as bank:
        bank.add("task", spec(**CASES[case]))
        bank.save("task", tmp_path / "start")
        ours = course(bank.model, tmp_path)
        with bank.use("task"):
            ours.train()
        bank.save("task", tmp_path / "ours")
    theirs = course(peft.PeftModel.from_pretrained(tiny(name), tmp_path / "start", is_trainable=True), tmp_path)
    theirs.train()
    theirs.model.save_pretrained(tmp_path / "theirs")
    assert len(ours.losses) == 8
    assert sum(ours.losses[-3:]) < sum(ours.losses[:3])
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-5)
    with Bank(tiny(name)) as bank:
        for side in ("ours", "theirs"):
            bank.load(side, tmp_path / side)
        got, want = (dict(bank.named_parameters(side)) for side in ("ours", "theirs"))
        assert got.keys() == want.keys()
        for path, tensor in got.items():
            torch.testing.assert_close(tensor, want[path], rtol=1e-5, atol=1e-5, msg=path)


def test_only_the_adapter_in_force_learns_and_peft_reads_it(tmp_path):
    model = tiny("llama")
    before = state_of(model)
    with Bank(model) as bank:
        trained(bank, "other", spec("all-linear"), seed=1)
        bank.add("task", spec("all-linear"))
        start = state(model)
        trainer = course(model, tmp_path)
        with bank.use("task"):
            trainer.train()
            want = output(model.eval(), words(2))
        assert moved(model, start) == {key for key in start if ".adapters.task." in key}
        bank.save("task", tmp_path / "task")
    assert state_of(model) == before
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "task").eval()
    torch.testing.assert_close(output(theirs, words(2)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit_dropout_included(reentrant, tmp_path):
    losses, digests = [], []
    saving = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for settings in ({}, saving):
        with Bank(tiny("llama")) as bank:
            bank.add("task", spec("all-linear", dropout=0.3))
            trainer = course(bank.model, tmp_path, gradient_accumulation_steps=2, **settings)
            with bank.use("task"):
                trainer.train()
            losses.append(trainer.losses)
            digests.append(bank.adapter("task").digest())
    assert losses[0] == losses[1]
    assert digests[0] == digests[1]


def test_mixed_precision_follows_full_precision(tmp_path):
    losses = []
    for bf16 in (False, True):
        with Bank(tiny("llama")) as bank:
            bank.add("task", spec("all-linear"))
            trainer = course(bank.model, tmp_path, bf16=bf16)
            with bank.use("task"):
                trainer.train()
            losses.append(trainer.losses)
            assert all(parameter.dtype == torch.float32 for _, parameter in bank.named_parameters("task"))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_evaluation_follows_the_route(tmp_path):
    with Bank(tiny("llama")) as bank:
        bank.add("task", spec("all-linear"))
        trainer = course(bank.model, tmp_path)
        base = trainer.evaluate()["eval_loss"]
        with bank.use("task"):
            assert trainer.evaluate()["eval_loss"] == base
            trainer.train()
            tuned = trainer.evaluate()["eval_loss"]
        assert tuned < base - 0.3
        assert trainer.evaluate()["eval_loss"] == base


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    digests = {}
    for stop in (False, True):
        with Bank(tiny("llama")) as bank:
            bank.add("task", spec("all-linear"))
            trainer = course(bank.model, tmp_path, save_strategy="steps", save_steps=3, seed=0)
            with bank.use("task"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if stop else None)
            assert len(trainer.losses) == (5 if stop else 8)
            digests[stop] = bank.adapter("task").digest()
    assert digests[True] == digests[False]


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path):
    with Bank(tiny("llama")) as bank:
        bank.add("task", spec("all-linear"))
        often = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
        trainer = course(bank.model, tmp_path, **often, **best)
        with bank.use("task"):
            trainer.train()
            got = trainer.evaluate()["eval_loss"]
        seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert got == seen[0] > seen[3], "the highest loss was called the best, and is that of the first checkpoint"


def test_save_model_writes_the_base_and_the_adapters_beside_it(tmp_path):
    model = tiny("llama")
    with Bank(model) as bank:
        bank.add("task", spec("all-linear"))
        trainer = course(model, tmp_path)
        with bank.use("task"):
            trainer.train()
        trainer.save_model(str(tmp_path / "whole"))
        held = state(model)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert state_of(again)[0] == state_of(model)[0]
    written = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(tensor, held[key]) for key, tensor in written.items())
    assert {key for key in held if ".adapters.task." in key} <= written.keys()


class Denoiser(nn.Module):
    """A module with a loss, of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, picture: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.body(picture + noise) - picture).square().mean()}


def test_any_module_with_a_loss_trains(tmp_path):
    model = Denoiser()
    before = state_of(model)
    picture, noise = torch.randn(2, 64, 1, 6, 6, generator=torch.Generator().manual_seed(0)).unbind()
    rows = [{"picture": p, "noise": n} for p, n in zip(picture, noise, strict=True)]
    with Bank(model) as bank:
        bank.add("task", spec((r"0", r"2")))
        trainer = Trainer(model=model, args=hf.TrainingArguments(output_dir=str(tmp_path), **SHORT), train_dataset=rows)
        with bank.use("task"):
            trainer.train()
        trainer.save_model(str(tmp_path / "whole"))
        assert trainer.losses[-1] < trainer.losses[0]
    assert state_of(model) == before
