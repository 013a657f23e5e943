"""The loop over every task: cutting changes nothing, together is alone, stopped and resumed are the same bits."""

import os
import signal
from contextlib import ExitStack

import numpy as np
import pytest

from rankwise.engine.evaluate import evaluate
from rankwise.engine.folder import held_folder
from rankwise.engine.interrupt import Interrupted
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.errors import DataError, ModelError, RunFolderError
from rankwise.surgery.bank import Bank
from tests.corpora import random_examples, random_labelled, random_masked, random_pairs, random_pictures
from tests.engine.test_loop import losses, same
from tests.grid import relative, spec, trained
from tests.models import tiny

RUN = Run(lr=5e-3)
MODELS = {"masked-lm": "roberta", "seq2seq": "t5", "sequence-classification": "bert", "image-classification": "vit"}
ALL = pytest.mark.parametrize("task", MODELS)


def many(task: str, seed: int = 0):
    """Eighteen documents of very different lengths."""
    lengths = [7, 9, 5, 12, 3, 40] * 3
    if task == "image-classification":
        return random_pictures(18, seed)
    if task == "seq2seq":
        return random_pairs([(length, 13 - length % 12) for length in lengths], seed)
    return (random_labelled if task == "sequence-classification" else random_masked)(lengths, seed)


def learn(task, examples, runs, loop, specs=None, out=None, **settings):
    """Trains fresh adapters, with a fresh output layer each where there are classes."""
    told: list[dict] = []
    whole = ("classifier",) if "classification" in task else ()
    with Bank(tiny(MODELS[task], task=task)) as bank:
        for name in runs:
            bank.add(name, (specs or {}).get(name, spec("all-linear", modules_to_save=whole)), seed=loop.seed)
        observe = settings.pop("observe", told.append)
        with ExitStack() as held:
            if out is not None:
                settings["out"] = held.enter_context(held_folder(out, resume=settings.get("resume", False)))
            outcomes = train(bank, runs, examples, loop=loop, observe=observe, **settings)
        tensors = {n: {p: t.detach().clone() for p, t in bank.named_parameters(n)} for n in bank.names}
    return tensors, told, outcomes


@ALL
def test_accumulation_changes_nothing(task):
    """Neither how many pieces a step is cut into nor, with them, which documents are padded together."""
    examples = many(task)
    whole = learn(task, examples, {"a": RUN}, Loop(batch_documents=9, epochs=2, micro_tokens=100_000))
    for micro_tokens in (1, 60):
        pieces = learn(task, examples, {"a": RUN}, Loop(batch_documents=9, epochs=2, micro_tokens=micro_tokens))
        np.testing.assert_allclose(losses(whole[1]), losses(pieces[1]), rtol=1e-5)
        for path, tensor in whole[0]["a"].items():
            assert relative(pieces[0]["a"][path], tensor) < 1e-3, path


@ALL
def test_many_trained_together_equal_each_trained_alone(task):
    examples, loop = many(task), Loop(batch_documents=6, epochs=1)
    whole = ("classifier",) if "classification" in task else ()
    runs = {"a": RUN, "b": Run(lr=1e-3, schedule="constant", weight_decay=0.1)}
    specs = {"a": spec("all-linear", modules_to_save=whole), "b": spec("minimal", rank=1, modules_to_save=whole)}
    together = learn(task, examples, runs, loop, specs)
    for name, run in runs.items():
        alone = learn(task, examples, {name: run}, loop, {name: specs[name]})
        np.testing.assert_allclose(losses(together[1], name), losses(alone[1], name), rtol=1e-5)


@ALL
def test_a_run_stopped_and_resumed_equals_one_that_was_not_to_the_bit(task, tmp_path):
    examples, valid = many(task), random_examples(task, seed=5)
    loop = Loop(batch_documents=4, epochs=2, evaluate_every=3)

    def run(folder, **settings):
        return learn(task, examples, {"a": RUN}, loop, valid=valid, out=tmp_path / folder, **settings)

    def stop(event):
        if event["kind"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("cut", observe=stop)
    resumed = run("cut", resume=True)
    assert same(resumed[0]["a"], whole[0]["a"])
    assert resumed[2] == whole[2]


@ALL
def test_other_documents_are_another_run(task, tmp_path):
    def stop(event):
        if event["kind"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    loop = Loop(batch_documents=4, epochs=1)
    with pytest.raises(Interrupted):
        learn(task, many(task), {"a": RUN}, loop, out=tmp_path / "out", observe=stop)
    with pytest.raises(RunFolderError, match="training documents"):
        learn(task, many(task, seed=1), {"a": RUN}, loop, out=tmp_path / "out", resume=True)


def rule(task: str, documents: int, seed: int):
    """Documents with a rule in them that a small model finds: their first word says all."""
    generator = np.random.default_rng(seed)
    if task == "image-classification":
        examples = random_pictures(documents, seed)
        examples.pixels[:] = examples.pixels // 6 + 50 * examples.labels[:, None, None, None].astype(np.uint8)
        return examples
    firsts = generator.integers(10, 13, size=documents)
    if task == "seq2seq":
        examples = random_pairs([(5, 3)] * documents, seed)
        laid = examples.laid.tokens.reshape(documents, 8)
        laid[:] = np.where(np.arange(8) < 5, firsts[:, None], firsts[:, None] + 20)
    elif task == "masked-lm":
        examples = random_masked([12] * documents, seed)
        examples.laid.tokens.reshape(documents, 12)[:] = firsts[:, None]
    else:
        examples = random_labelled([6] * documents, seed)
        laid = examples.laid.tokens.reshape(documents, 7)
        laid[:, :6], laid[:, 6] = firsts[:, None], firsts - 10
    return examples


@ALL
def test_it_learns_a_rule_and_says_so_on_documents_it_has_not_seen(task):
    examples, unseen = rule(task, 60, 0), rule(task, 30, 1)
    whole = ("classifier",) if "classification" in task else ()
    name = "bart" if task == "seq2seq" else MODELS[task]  # T5 scales its logits down: random weights say little there
    with Bank(tiny(name, task=task)) as bank:
        bank.add("a", spec("all-linear", rank=8, modules_to_save=whole))
        told: list[dict] = []
        loop = Loop(batch_documents=10, epochs=12)
        train(bank, {"a": Run(lr=2e-2)}, examples, valid=unseen, loop=loop, observe=told.append)
        found = evaluate(bank, ["a"], unseen)
    assert np.mean(losses(told)[-3:]) < 0.5 * losses(told)[0]
    (one,) = found.summary()["adapters"]
    assert one["delta"]["high"] < 0
    if whole:
        assert one["accuracy"]["value"] > 0.9 > found.summary()["base"]["accuracy"]["value"]
        assert one["accuracy_delta"]["mcnemar_p"] < 0.01
    else:
        assert "accuracy" not in one


# ── what is compared ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_class_frequencies_stand_in_the_place_of_a_base_that_has_no_head():
    examples = random_labelled([9, 4, 30, 17], classes=3)
    with Bank(tiny("bert", task="sequence-classification")) as bank:
        trained(bank, "one", spec("minimal", modules_to_save=("classifier",)))
        with_base = evaluate(bank, ["one"], examples)
        found = evaluate(bank, ["one"], examples, frequencies=(5, 1, 10))
        with pytest.raises(DataError, match="2 frequencies for 3 classes"):
            evaluate(bank, ["one"], examples, frequencies=(5, 1))
    shares = np.array([6, 2, 11]) / 19  # one more of each: none is impossible
    np.testing.assert_allclose(found.base, -np.log(shares)[examples.labels])
    np.testing.assert_allclose(found.losses, with_base.losses)
    assert found.summary()["reference"] == "class frequencies"
    assert found.summary()["base"]["accuracy"]["value"] == float((examples.labels == 2).mean())
    assert with_base.summary()["reference"] == "base"
    assert found.differences[0].mean == pytest.approx(float((found.losses[0] - found.base).mean()))


def test_documents_of_other_classes_than_the_models_are_refused():
    with Bank(tiny("bert", task="sequence-classification")) as bank:
        bank.add("a", spec("minimal"))
        with pytest.raises(ModelError, match="tells 3 classes apart, the documents are of 2"):
            evaluate(bank, ["a"], random_labelled([5, 6], classes=2))
