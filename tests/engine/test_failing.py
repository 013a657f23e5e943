"""Runs that cannot go well: what is refused before the first step, what stops one, and what is kept of it."""

import json
import os
import signal
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn

from rankwise.engine import loop as loop_module
from rankwise.engine.evaluate import evaluate
from rankwise.engine.folder import held_folder
from rankwise.engine.interrupt import Interrupted
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.engine.trainee import Trainee
from rankwise.errors import SpecError, TrainingError
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import spec
from tests.models import tiny

RUN, CORPUS = Run(lr=5e-3), random_corpus([7, 9, 5, 12] * 4)


def judged_as(monkeypatch, values):
    """Validation losses, per token and in turn; the last of them from then on."""
    told = list(values)

    def losses(forward, corpus, names, *_):
        value = told.pop(0) if len(told) > 1 else told[0]
        return np.full((len(names), len(corpus)), value * corpus.supervised_counts().sum() / len(corpus))

    monkeypatch.setattr(loop_module, "document_losses", losses)


def learn(out=None, model=None, chosen=None, runs=None, **settings):
    told: list[dict] = []
    with Bank(model or tiny("llama")) as bank:
        bank.add("a", chosen or spec("minimal"))
        runs = {"a": RUN} if runs is None else runs
        if out is None:
            outcomes = train(bank, runs, CORPUS, observe=told.append, **settings)
        else:
            with held_folder(out, resume=settings.get("resume", False)) as folder:
                outcomes = train(bank, runs, CORPUS, out=folder, observe=told.append, **settings)
        tensors = {path: tensor.detach().clone() for path, tensor in bank.named_parameters("a")}
    return tensors, told, outcomes["a"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_validation_loss_that_is_not_finite_counts_as_diverged_and_the_best_is_kept(monkeypatch, tmp_path, bad):
    judged_as(monkeypatch, [3.0, 2.0, bad])
    loop, settings = Loop(batch_documents=2, evaluate_every=2), {"valid": CORPUS.subset(range(4))}
    tensors, told, outcome = learn(tmp_path / "run", loop=loop, **settings)
    assert (outcome.status, outcome.best_step, outcome.best_loss) == ("diverged", 2, pytest.approx(2.0))
    assert outcome.steps == 4
    assert [e["step"] for e in told if e["kind"] == "evaluation"] == [0, 2]
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (stop,) = [e for e in events if e.get("what") == "diverged"]
    assert stop["message"] == f"the validation loss is {bad}"
    again, _, resumed = learn(tmp_path / "run", loop=loop, resume=True, **settings)
    assert resumed == outcome
    assert all(torch.equal(again[path], tensor) for path, tensor in tensors.items())


def test_without_any_finite_number_there_is_nothing_to_return(monkeypatch):
    judged_as(monkeypatch, [float("nan")])
    with pytest.raises(TrainingError, match="a: diverged"):
        learn(valid=CORPUS.subset(range(4)))
    monkeypatch.setattr(Trainee, "step", lambda self, lr: None)
    with pytest.raises(TrainingError, match="a: not finite"):
        learn(loop=Loop(batch_documents=2))


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_target_that_is_never_called_is_named_after_the_second_step(steps):
    model = tiny("llama")
    model.model.layers[1].unused = nn.Linear(32, 32)
    told: list[dict] = []
    with Bank(model) as bank:
        bank.add("a", spec(("unused", "q_proj")))
        with pytest.raises(TrainingError, match="train nothing") as caught:
            train(bank, {"a": RUN}, CORPUS, loop=Loop(batch_documents=2, max_steps=steps), observe=told.append)
    assert str(caught.value).count("model.layers.1.unused") == 2
    assert "q_proj" not in str(caught.value)
    assert len([e for e in told if e["kind"] == "step"]) == min(steps, 2)


def test_an_expert_that_no_token_has_asked_for_yet_is_no_error():
    model = tiny("llama")
    model.model.layers[1].experts = nn.ModuleList([nn.Linear(32, 32)])
    assert learn(model=model, chosen=spec(("experts.0", "q_proj")))[2].status == "finished"


def test_a_model_in_float16_is_evaluated_but_not_trained():
    with Bank(tiny("llama", torch.float16)) as bank:
        bank.add("a", spec("minimal"))
        with pytest.raises(SpecError, match="bfloat16 or float32"):
            train(bank, {"a": RUN}, CORPUS)
        assert np.isfinite(evaluate(bank, ["a"], CORPUS).losses[0]).all()


def test_no_adapter_to_train_is_an_error():
    with pytest.raises(SpecError, match="no adapter to train"):
        learn(runs={})


def test_fewer_tokens_at_once_than_adapters_still_trains():
    with Bank(tiny("llama")) as bank:
        for name in ("a", "b", "c"):
            bank.add(name, spec("minimal"))
        loop = Loop(batch_documents=2, max_steps=2, micro_tokens=1)
        outcomes = train(bank, dict.fromkeys(("a", "b", "c"), RUN), CORPUS, loop=loop)
    assert {outcome.status for outcome in outcomes.values()} == {"finished"}


@pytest.mark.parametrize("resumed", [False, True])
def test_one_that_stops_lets_go_of_what_only_learning_needs_and_disturbs_no_other(tmp_path, resumed):
    """Its moments and gradients, two thirds of what an adapter takes in training."""
    runs, loop = {"a": RUN, "wild": Run(lr=1.0)}, Loop(batch_documents=2, epochs=2, evaluate_every=4)
    specs = {"a": spec("minimal"), "wild": spec(targets=("lm_head",))}
    held: list[int] = []

    def learn(runs, out=None, stop=None, resume=False):
        told: list[dict] = []
        with Bank(tiny("llama")) as bank:
            for name in runs:
                bank.add(name, specs[name])

            def observe(event):
                told.append(event)
                if event.get("what") == "diverged":
                    held.append(sum(p.grad is not None for _, p in bank.named_parameters("wild")))
                if event.get("step") == stop and event["kind"] == "evaluation" and event["adapter"] == "a":
                    os.kill(os.getpid(), signal.SIGTERM)

            with ExitStack() as keeping:
                folder = keeping.enter_context(held_folder(out, resume=resume)) if out else None
                outcomes = train(
                    bank, runs, CORPUS, valid=CORPUS, loop=loop, observe=observe, out=folder, resume=resume
                )
            return told, outcomes, bank.adapter("a").digest(), bank.adapter("wild").digest() if "wild" in runs else ""

    together, outcomes, digest, wild = learn(runs)
    assert outcomes["wild"].status == "diverged"
    alone, _, _, _ = learn({"a": RUN})
    steps = [[e["loss"] for e in told if e["kind"] == "step" and e["adapter"] == "a"] for told in (together, alone)]
    np.testing.assert_allclose(*steps, rtol=1e-5)
    assert held == [0]
    if resumed:
        with pytest.raises(Interrupted):
            learn(runs, tmp_path / "run", stop=12)
        _, outcomes, same, wild_too = learn(runs, tmp_path / "run", resume=True)
        assert (same, wild_too) == (digest, wild)
        assert outcomes["wild"].status == "diverged"
