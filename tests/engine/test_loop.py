import json
import os
import signal
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from rankwise.engine.evaluate import evaluate
from rankwise.engine.folder import held_folder
from rankwise.engine.interrupt import Interrupted
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.errors import DataError, RunFolderError, SpecError
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus, random_corpus
from tests.grid import relative, spec
from tests.models import tiny

RUN = Run(lr=5e-3)


def learn(corpus, runs, loop, specs=None, out=None, **settings):
    """Trains fresh adapters; their tensors, what was told, and how it ended."""
    told: list[dict] = []
    model = tiny("llama")
    with Bank(model) as bank:
        for name in runs:
            bank.add(name, (specs or {}).get(name, spec("all-linear")), seed=loop.seed)
        observe = settings.pop("observe", told.append)
        with ExitStack() as held:
            if out is not None:
                settings["out"] = held.enter_context(held_folder(out, resume=settings.get("resume", False)))
            outcomes = train(bank, runs, corpus, loop=loop, observe=observe, **settings)
        tensors = {n: {p: t.detach().clone() for p, t in bank.named_parameters(n)} for n in bank.names}
    return tensors, told, outcomes


def losses(told, name="a"):
    return [e["loss"] for e in told if e["kind"] == "step" and e["adapter"] == name]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[path], other[path]) for path in one)


def test_it_learns():
    _, told, outcomes = learn(pattern_corpus(60), {"a": Run(lr=2e-2)}, Loop(epochs=20, batch_tokens=150))
    found = losses(told)
    assert np.mean(found[-3:]) < 0.5 * found[0]
    assert outcomes["a"].status == "finished"
    assert outcomes["a"].steps == len(found)


def test_accumulation_changes_nothing():
    corpus = random_corpus([7, 3, 11, 5, 9, 2, 6, 4, 8, 10])
    whole = learn(corpus, {"a": RUN}, Loop(batch_documents=8, epochs=2, micro_tokens=10_000))
    pieces = learn(corpus, {"a": RUN}, Loop(batch_documents=8, epochs=2, micro_tokens=1))
    np.testing.assert_allclose(losses(whole[1]), losses(pieces[1]), rtol=1e-5)
    for path, tensor in whole[0]["a"].items():
        assert relative(pieces[0]["a"][path], tensor) < 1e-3, path


def test_the_same_seed_gives_the_same_bits():
    corpus, loop = random_corpus([7, 9, 5, 12] * 3), Loop(batch_tokens=30, epochs=1)
    chosen = {"a": spec("all-linear", dropout=0.3)}
    first, second = (learn(corpus, {"a": RUN}, loop, chosen) for _ in range(2))
    assert same(first[0]["a"], second[0]["a"])
    other = learn(corpus, {"a": RUN}, Loop(batch_tokens=30, epochs=1, seed=1), chosen)
    assert not same(first[0]["a"], other[0]["a"])


def test_many_trained_together_equal_each_trained_alone():
    corpus, loop = random_corpus([7, 9, 5, 12, 3, 20] * 2), Loop(batch_tokens=40, epochs=2)
    runs = {"a": RUN, "b": Run(lr=1e-3, schedule="constant", weight_decay=0.1), "c": Run(lr=2e-2, clip=0.01)}
    specs = {"a": spec("all-linear", dropout=0.2), "b": spec("minimal", rank=1), "c": spec(("lm_head", "up_proj"))}
    together = learn(corpus, runs, loop, specs)
    for name, run in runs.items():
        alone = learn(corpus, {name: run}, loop, {name: specs[name]})
        np.testing.assert_allclose(losses(together[1], name), losses(alone[1], name), rtol=1e-5)


# ── stopping and going on ────────────────────────────────────────────────────────────────────────────────────────────

LONG = Loop(batch_tokens=40, epochs=3, evaluate_every=3, patience=50)


def long_run(tmp_path, **settings):
    corpus = random_corpus([7, 9, 5, 12, 3, 20] * 3)
    chosen = {"a": spec("all-linear", dropout=0.2)}
    return learn(corpus, {"a": RUN}, LONG, chosen, valid=random_corpus([9, 9, 4], seed=5), out=tmp_path, **settings)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", [1, 4, 9])
def test_a_run_stopped_and_resumed_equals_one_that_was_not_to_the_bit(tmp_path, number, when):
    whole = long_run(tmp_path / "whole")

    def stop(event):
        if event["kind"] == "step" and event["step"] == when:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        long_run(tmp_path / "cut", observe=stop)
    assert caught.value.number == number
    resumed = long_run(tmp_path / "cut", resume=True)
    assert same(resumed[0]["a"], whole[0]["a"])

    def lines(folder):
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in event.items() if k != "seconds"} for event in events]

    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_moments_come_back_in_the_layout_of_what_they_belong_to(tmp_path):
    """Fused, AdamW goes through a weight and its moments in the order of the memory, whatever their strides."""
    corpus, loop = random_corpus([7, 9, 5, 12, 3, 20]), Loop(batch_tokens=20, max_steps=6, save_every=2)

    def heads(out, **settings):
        model = tiny("llama")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().t().contiguous().t())
        with Bank(model) as bank, held_folder(out, resume=settings.get("resume", False)) as folder:
            bank.add("a", spec(("q_proj",), modules_to_save=("lm_head",)))
            train(bank, {"a": RUN}, corpus, loop=loop, out=folder, **settings)
            return bank.adapter("a").digest()

    def stop(event):
        if event["kind"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = heads(tmp_path / "whole")
    with pytest.raises(Interrupted):
        heads(tmp_path / "cut", observe=stop)
    assert heads(tmp_path / "cut", resume=True) == whole


def test_a_run_stopped_during_validation_resumes_too(tmp_path):
    whole = long_run(tmp_path / "whole")
    corpus = random_corpus([7, 9, 5, 12, 3, 20] * 3)
    from rankwise.engine import loop as module

    real, calls = module.document_losses, []

    def stopping(forward, corpus, names, micro_tokens, progress):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(forward, corpus, names, micro_tokens, progress)

    module.document_losses = stopping
    try:
        with pytest.raises(Interrupted):
            long_run(tmp_path / "cut")
    finally:
        module.document_losses = real
    assert same(long_run(tmp_path / "cut", resume=True)[0]["a"], whole[0]["a"])
    assert len(corpus)


def test_resume_passes_over_a_damaged_checkpoint(tmp_path):
    whole = long_run(tmp_path / "whole")

    def stop(event):
        if event["kind"] == "step" and event["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        long_run(tmp_path / "cut", observe=stop)
    newest = tmp_path / "cut" / "checkpoints" / "step-000008" / "adapter-a.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = long_run(tmp_path / "cut", resume=True)
    assert same(resumed[0]["a"], whole[0]["a"])
    assert any(event.get("what") == "damaged checkpoint passed over" for event in resumed[1])


def test_resume_refuses_what_would_be_another_run_and_says_why(tmp_path):
    def stop(event):
        if event["kind"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        long_run(tmp_path, observe=stop)
    with pytest.raises(RunFolderError) as caught:
        learn(random_corpus([5, 5]), {"a": Run(lr=1e-2)}, LONG, {"a": spec()}, out=tmp_path, resume=True)
    for piece in ("training documents: was", "adapters.a.run.lr: was 0.005, is 0.01", "adapters.a.spec.dropout"):
        assert piece in str(caught.value)


def test_a_run_that_made_its_last_step_but_left_no_results_gives_its_weights_again(tmp_path):
    """It was killed between its last checkpoint and the saving of the adapter, which may be minutes later."""
    whole = long_run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    again = long_run(tmp_path, resume=True)
    assert same(again[0]["a"], whole[0]["a"])
    assert again[2] == whole[2]
    assert not losses(again[1])
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_stopped_at_its_last_validation_is_resumed_to_its_end(tmp_path):
    whole = long_run(tmp_path / "whole")
    steps = whole[2]["a"].steps

    def stop(event):
        if event["kind"] == "step" and event["step"] == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        long_run(tmp_path / "cut", observe=stop)
    resumed = long_run(tmp_path / "cut", resume=True)
    assert same(resumed[0]["a"], whole[0]["a"])
    assert resumed[2] == whole[2]


def test_a_complete_run_is_not_resumed_and_a_folder_not_overwritten(tmp_path):
    long_run(tmp_path)
    (tmp_path / "README.md").write_text("the model card, written last")
    with pytest.raises(RunFolderError, match="the run is finished"):
        long_run(tmp_path, resume=True)
    with pytest.raises(RunFolderError, match="holds a run already"):
        long_run(tmp_path)
    with pytest.raises(RunFolderError, match="no run to resume"):
        long_run(tmp_path / "empty", resume=True)


def test_two_runs_cannot_share_a_folder(tmp_path):
    with held_folder(tmp_path, resume=False), pytest.raises(RunFolderError, match="another run is writing"):
        long_run(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write here"):
        long_run(tmp_path / "file" / "run")


# ── what can go wrong ────────────────────────────────────────────────────────────────────────────────────────────────


def poison(times):
    """Makes the weights of an adapter's first site NaN before some steps, and well again after."""
    from rankwise.engine import trainee as module

    real = module.Trainee.step

    def step(self, lr):
        step.count += 1
        if self.name == "a" and step.count in times:
            next(iter(self.parameters.values())).grad.fill_(float("nan"))
        return real(self, lr)

    step.count = 0
    return module.Trainee, step


def test_a_step_that_is_not_finite_is_skipped_counted_and_its_rows_named(monkeypatch):
    owner, step = poison({3})
    monkeypatch.setattr(owner, "step", step)
    corpus = random_corpus([7, 9, 5, 12] * 3)
    tensors, told, outcomes = learn(corpus, {"a": RUN}, Loop(batch_documents=2, epochs=1))
    skipped = [event for event in told if event.get("what") == "skipped"]
    assert [event["step"] for event in skipped] == [3]
    assert len(skipped[0]["rows"]) == 2
    assert all(row.startswith("random.jsonl:") for row in skipped[0]["rows"])
    assert outcomes["a"].skipped == 1
    assert all(tensor.isfinite().all() for tensor in tensors["a"].values())


def test_five_in_a_row_stop_the_run_with_the_last_good_weights(monkeypatch, tmp_path):
    owner, step = poison(set(range(4, 100)))
    monkeypatch.setattr(owner, "step", step)
    corpus, loop = random_corpus([7, 9, 5, 12] * 5), Loop(batch_documents=2, save_every=1)
    tensors, _, outcomes = learn(corpus, {"a": RUN}, loop, out=tmp_path)
    assert (outcomes["a"].status, outcomes["a"].skipped, outcomes["a"].best_loss) == ("not finite", 5, None)
    assert all(tensor.isfinite().all() for tensor in tensors["a"].values())
    again, _, outcomes = learn(corpus, {"a": RUN}, loop, out=tmp_path, resume=True)
    assert outcomes["a"].status == "not finite"
    assert same(again["a"], tensors["a"])
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e.get("what") == "skipped"] == [4, 5, 6, 7, 8]
    assert [e["step"] for e in events if e["kind"] == "step"] == [1, 2, 3]


def test_one_bad_adapter_does_not_disturb_another(monkeypatch):
    corpus, loop = random_corpus([7, 9, 5, 12] * 4), Loop(batch_documents=2)
    alone = learn(corpus, {"b": RUN}, loop)
    owner, step = poison(set(range(1, 100)))
    monkeypatch.setattr(owner, "step", step)
    _, told, outcomes = learn(corpus, {"a": RUN, "b": RUN}, loop)
    assert outcomes["a"].status == "not finite"
    assert outcomes["b"].status == "finished"
    np.testing.assert_allclose(losses(told, "b"), losses(alone[1], "b"), rtol=1e-5)


def test_a_diverging_run_is_stopped_and_ends_at_its_best():
    corpus, told = pattern_corpus(60), []
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec("all-linear", rank=8))
        train(bank, {"a": Run(lr=2e-2)}, corpus, loop=Loop(epochs=20, batch_tokens=150))
        wild = Run(lr=3.0, schedule="constant", warmup=0.5)
        loop = Loop(epochs=40, batch_tokens=150, evaluate_every=1)
        outcomes = train(bank, {"a": wild}, corpus, valid=corpus.subset(range(10)), loop=loop, observe=told.append)
        assert outcomes["a"].status == "diverged"
        steps = [event["step"] for event in told if event["kind"] == "step"]
        assert steps[-1] < 200
        best = min(event["loss"] for event in told if event["kind"] == "evaluation" and event["step"])
        found = evaluate(bank, ["a"], corpus.subset(range(10)))
        assert found.loss(found.losses[0]) == pytest.approx(best, rel=1e-6)
        assert outcomes["a"].best_loss == best


def test_early_stopping_ends_at_the_best_weights():
    corpus, valid = random_corpus([9] * 6, seed=1), random_corpus([9] * 6, seed=2)
    loop = Loop(epochs=60, batch_documents=6, evaluate_every=1, patience=3)
    tensors, told, outcomes = learn(corpus, {"a": Run(lr=3e-2, schedule="constant", warmup=0)}, loop, valid=valid)
    judged = {e["step"]: e["loss"] for e in told if e["kind"] == "evaluation"}
    best = min(judged, key=judged.__getitem__)
    assert outcomes["a"].status == "early"
    assert outcomes["a"].best_step == best
    assert outcomes["a"].steps == best + 3
    stopped = Loop(epochs=60, batch_documents=6, max_steps=max(best, 1), seed=0)
    if best:
        again = learn(corpus, {"a": Run(lr=3e-2, schedule="constant", warmup=0)}, stopped)[0]["a"]
        assert all(relative(tensors["a"][path], again[path]) < 1e-4 for path in again)


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(DataError):
        learn(random_corpus([5]).subset([]), {"a": RUN}, Loop())


def test_schedules_begin_low_and_end_where_they_should():
    for schedule, last in (("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)):
        run = Run(lr=1.0, schedule=schedule, warmup=0.1)
        rates = [run.lr_at(step, 100) for step in range(100)]
        assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
        assert max(rates) == rates[9] == 1.0
        assert rates[-1] == pytest.approx(last, abs=0.02)
    assert Run(lr=1.0, warmup=0).lr_at(0, 1) == 1.0
    with pytest.raises(SpecError, match="did you mean 'warmup'"):
        Run(warmups=1)
