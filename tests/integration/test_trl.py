"""TRL's trainers on a model that holds a bank: supervised tuning and preferences, step by step as with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
import trl
from datasets import Dataset
from torch import Tensor, nn

from rankwise.engine.evaluate import evaluate
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.errors import RankwiseWarning
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import relative, spec, state_of, trained
from tests.integration.course import SHORT, moved, recording, state
from tests.jobs.world import write_model
from tests.models import output

SFTTrainer, DPOTrainer = recording(trl.SFTTrainer), recording(trl.DPOTrainer)
ANSWERS = [{"prompt": f"what is {n} and {n}?", "completion": f" that is {2 * n}"} for n in range(32)]
PREFERENCES = [
    {"prompt": f"what is {n} and {n}?", "chosen": f" that is {2 * n}", "rejected": f" who knows {n + 1}"}
    for n in range(32)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model")


def loaded(base: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(base).eval()


def sft(model: nn.Module, base: Path, folder: Path, **settings: Any) -> Any:
    arguments = trl.SFTConfig(**{"output_dir": str(folder), "bf16": False, **SHORT, **settings})
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list(ANSWERS)
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def dpo(model: nn.Module, base: Path, folder: Path, **settings: Any) -> Any:
    arguments = trl.DPOConfig(**{"output_dir": str(folder), "bf16": False, **SHORT, **settings})
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list(PREFERENCES)
    return DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def agree(ours: Path, theirs: Path, base: Path) -> None:
    """Two adapter folders hold the same tensors, but for rounding."""
    with Bank(loaded(base)) as bank:
        bank.load("ours", ours)
        bank.load("theirs", theirs)
        got, want = (dict(bank.named_parameters(name)) for name in ("ours", "theirs"))
    assert got.keys() == want.keys()
    for path, tensor in got.items():
        torch.testing.assert_close(tensor, want[path], rtol=1e-5, atol=1e-5, msg=path)


def test_supervised_tuning_is_that_of_peft_and_leaves_the_base_alone(base, tmp_path):
    model = loaded(base)
    before = state_of(model)
    with Bank(model) as bank:
        trained(bank, "other", spec("attention"), seed=1)
        bank.add("task", spec("all-linear"))
        bank.save("task", tmp_path / "start")
        start = state(model)
        ours = sft(model, base, tmp_path)
        assert ours.args.gradient_checkpointing, "TRL's own choice"
        with bank.use("task"):
            ours.train()
            want = output(model.eval(), {"input_ids": torch.arange(5, 30)[None]})
        assert moved(model, start) == {key for key in start if ".adapters.task." in key}
        bank.save("task", tmp_path / "ours")
    assert state_of(model) == before
    theirs = sft(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "start", is_trainable=True), base, tmp_path)
    theirs.train()
    theirs.model.save_pretrained(tmp_path / "theirs")
    assert ours.losses[-1] < ours.losses[0] - 0.5
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-5)
    agree(tmp_path / "ours", tmp_path / "theirs", base)
    again = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "ours").eval()
    got = output(again, {"input_ids": torch.arange(5, 30)[None]})
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_trl_has_tuned_the_engine_judges_and_trains_on(base, tmp_path):
    """TRL leaves its own forward and hooks on the model; the engine finds its way past them, to the same bits."""
    corpus, found = random_corpus([9, 14, 20, 7]), []
    for again in (False, True):
        with Bank(loaded(base)) as bank:
            if again:
                bank.load("task", tmp_path / "task")
            else:
                bank.add("task", spec("all-linear"))
                trainer = sft(bank.model, base, tmp_path)
                with bank.use("task"):
                    trainer.train()
                bank.save("task", tmp_path / "task")
            losses = evaluate(bank, ["task"], corpus).losses.tolist()
            train(bank, {"task": Run(lr=1e-3)}, corpus, loop=Loop(max_steps=3))
            found.append((losses, bank.adapter("task").digest()))
    assert found[0] == found[1]


def test_a_head_trained_whole_learns_though_its_weight_is_only_read(base, tmp_path):
    whole = spec("minimal", modules_to_save=("lm_head",))
    with Bank(loaded(base)) as bank:
        bank.add("task", whole)
        bank.save("task", tmp_path / "start")
        ours = sft(bank.model, base, tmp_path)
        with bank.use("task"):
            ours.train()
        bank.save("task", tmp_path / "ours")
    theirs = sft(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "start", is_trainable=True), base, tmp_path)
    theirs.train()
    theirs.model.save_pretrained(tmp_path / "theirs")
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-5)
    agree(tmp_path / "ours", tmp_path / "theirs", base)


def test_an_adapter_on_the_head_that_trl_goes_past_is_told_of(base, tmp_path):
    with Bank(loaded(base)) as bank:
        bank.add("task", spec(("lm_head", "q_proj")))
        trainer = sft(bank.model, base, tmp_path, max_steps=2)
        with bank.use("task"):
            trainer.train()
        with pytest.warns(RankwiseWarning, match=r"1 of its 3 sites change nothing.*\n.*lm_head"):
            bank.save("task", tmp_path / "task")


def test_training_without_a_route_is_told_of(base, tmp_path):
    """Checkpointing lets the embedding's output require gradients, so that torch finds nothing wrong."""
    with Bank(loaded(base)) as bank:
        bank.add("task", spec("all-linear"))
        before = bank.adapter("task").digest()
        trainer = sft(bank.model, base, tmp_path, max_steps=1)
        with pytest.warns(RankwiseWarning, match="no adapter learns"):
            trainer.train()
        assert bank.adapter("task").digest() == before


# ── preferences ──────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def log_probabilities(model: nn.Module, base: Path, which: str) -> Tensor:
    """Of each answer given its prompt, in float64, one by one: what a reference model says, by hand."""
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    found = []
    for row in PREFERENCES:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row[which])["input_ids"]
        tokens = torch.tensor([*prompt, *answer, tokenizer.eos_token_id])
        logits = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].double()
        found.append(logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize("within", [None, "task"])
def test_the_reference_is_what_the_route_says_where_the_trainer_is_made(within, base, tmp_path):
    """Outside any route the bare base; inside, the adapter as it was before it went on learning."""
    with Bank(loaded(base)) as bank:
        trained(bank, "task", spec("all-linear"), size=0.05)
        bank.save("task", tmp_path / "start")
        with bank.use(within):
            trainer = dpo(bank.model, base, tmp_path, precompute_ref_log_probs=True)
        with bank.use("task"):
            trainer.train()
    clean = loaded(base)
    if within:
        clean = peft.PeftModel.from_pretrained(clean, tmp_path / "start").eval()
    for which in ("chosen", "rejected"):
        got = torch.tensor(trainer.train_dataset[f"ref_{which}_logps"])
        assert relative(got, log_probabilities(clean, base, which)) < 1e-5
    assert trainer.losses[-1] < trainer.losses[0]


@pytest.mark.parametrize("precomputed", [True, False])
def test_preferences_are_learnt_as_with_peft(precomputed, base, tmp_path):
    """PEFT's reference is its base; ours the bare base, asked beforehand, or a second model that TRL loads by name."""
    model = loaded(base)
    before = state_of(model)
    with Bank(model) as bank:
        bank.add("task", spec("all-linear"))
        bank.save("task", tmp_path / "start")
        start = state(model)
        ours = dpo(model, base, tmp_path, precompute_ref_log_probs=precomputed)
        with bank.use("task"):
            ours.train()
        assert moved(model, start) == {key for key in start if ".adapters.task." in key}
        bank.save("task", tmp_path / "ours")
    assert state_of(model) == before
    theirs = dpo(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "start", is_trainable=True), base, tmp_path)
    theirs.train()
    theirs.model.save_pretrained(tmp_path / "theirs", selected_adapters=["default"])
    assert ours.losses[0] == pytest.approx(0.6931472)  # nothing is preferred yet
    assert ours.losses[-1] < 0.5
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-5)
    agree(tmp_path / "ours", tmp_path / "theirs", base)


def test_dropout_is_off_for_preferences_as_trl_has_it(base, tmp_path):
    digests = []
    for dropout in (0.0, 0.3):
        with Bank(loaded(base)) as bank:
            bank.add("task", spec("attention", dropout=dropout))
            trainer = dpo(bank.model, base, tmp_path, precompute_ref_log_probs=True, max_steps=3)
            with bank.use("task"):
                trainer.train()
            digests.append(bank.adapter("task").digest())
    assert digests[0] == digests[1]
