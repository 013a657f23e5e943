"""Ctrl-C and SIGTERM: the first is a wish, heard between two pieces of work; a second Ctrl-C is obeyed at once."""

import os
import signal
import threading

import pytest
import torch

from rankwise.engine.folder import held_folder
from rankwise.engine.interrupt import Interrupt, Interrupted
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.errors import RunFolderError
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import spec, state_of
from tests.models import tiny

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@BOTH
def test_the_first_signal_waits_until_somebody_asks(number):
    with Interrupt() as interrupt:
        interrupt.check()
        send(number)
        with pytest.raises(Interrupted) as caught:
            interrupt.check()
    assert caught.value.number == number
    assert str(caught.value) == signal.Signals(number).name


@BOTH
def test_a_second_ctrl_c_stops_at_once_whatever_came_first(number):
    with Interrupt():
        send(number)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_second_sigterm_is_as_patient_as_the_first():
    """What sends it will kill for good if it must; until then there is something to save."""
    with Interrupt() as interrupt:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            interrupt.check()


@BOTH
def test_where_there_is_nothing_to_save_the_first_one_is_obeyed(number):
    with Interrupt(at_once=True), pytest.raises(Interrupted) as caught:
        send(number)
    assert caught.value.number == number


def test_whoever_listened_before_listens_again_after_an_end_and_after_an_error():
    before = handlers()
    with Interrupt():
        assert handlers() != before
    assert handlers() == before
    with pytest.raises(KeyError), Interrupt():
        raise KeyError
    assert handlers() == before


def test_one_within_another_hears_alone():
    with Interrupt() as outer:
        with Interrupt() as inner:
            send(signal.SIGTERM)
            assert inner.number == signal.SIGTERM
        outer.check()


def test_in_another_thread_nothing_is_changed_and_nothing_heard():
    before, found = handlers(), []

    def work() -> None:
        with Interrupt() as interrupt:
            found.append(handlers())
            interrupt.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_no_code_on_the_way_takes_it_for_an_error():
    assert not issubclass(Interrupted, Exception)


# ── in training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def learn(out, observe=None, resume=False, save_apart=0.0) -> dict[str, torch.Tensor]:
    with held_folder(out, resume=resume) as folder, Bank(tiny("llama")) as bank:
        bank.add("a", spec("all-linear", dropout=0.2))
        before = state_of(bank.model)[1], bank.model.config._attn_implementation
        try:
            loop = Loop(batch_tokens=40, epochs=2, save_every=2, save_apart=save_apart)
            settings = {"loop": loop, "out": folder, "resume": resume, "observe": observe}
            train(bank, {"a": Run(lr=5e-3)}, random_corpus([7, 9, 5, 12] * 4), **settings)
        finally:  # however it ended, the model is its owner's again
            assert (state_of(bank.model)[1], bank.model.config._attn_implementation) == before
        return {path: tensor.detach().clone() for path, tensor in bank.named_parameters("a")}


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_at_once_by_a_second_ctrl_c_is_resumed_from_its_last_checkpoint(tmp_path, first):
    whole, listeners = learn(tmp_path / "whole"), handlers()

    def stop(event):
        if event["kind"] == "step" and event["step"] == 5:
            send(first)
            send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", stop)
    assert handlers() == listeners
    saved = sorted(place.name for place in (tmp_path / "cut" / "checkpoints").iterdir())
    assert saved == ["step-000002", "step-000004"]
    resumed = learn(tmp_path / "cut", resume=True)
    assert all(torch.equal(resumed[path], whole[path]) for path in whole)


def test_checkpoints_too_near_one_another_are_left_out_but_that_of_a_run_that_is_stopped(tmp_path):
    def stop(event):
        if event["kind"] == "step" and event["step"] == 5:
            send(signal.SIGTERM)

    whole = learn(tmp_path / "whole", save_apart=3600)
    assert [*(tmp_path / "whole").rglob("step-*")] == []
    with pytest.raises(Interrupted):
        learn(tmp_path / "cut", stop, save_apart=3600)
    assert [place.name for place in (tmp_path / "cut").rglob("step-*")] == ["step-000005"]
    resumed = learn(tmp_path / "cut", resume=True, save_apart=3600)
    assert all(torch.equal(resumed[path], whole[path]) for path in whole)


def test_a_run_stopped_before_its_first_step_is_resumed_from_there(tmp_path):
    whole = learn(tmp_path / "whole")

    def stop(event):
        if event["kind"] == "start":
            send(signal.SIGTERM)

    with pytest.raises(Interrupted):
        learn(tmp_path / "cut", stop)
    resumed = learn(tmp_path / "cut", resume=True)
    assert all(torch.equal(resumed[path], whole[path]) for path in whole)


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_says_so(tmp_path):
    whole = learn(tmp_path / "whole")

    def die(event):
        if event["kind"] == "step":
            raise SystemExit  # nothing is saved on this way out

    with pytest.raises(SystemExit):
        learn(tmp_path / "cut", die)
    assert not (tmp_path / "cut" / "checkpoints").exists()
    told: list[dict] = []
    resumed = learn(tmp_path / "cut", told.append, resume=True)
    assert all(torch.equal(resumed[path], whole[path]) for path in whole)
    assert [event["what"] for event in told if event["kind"] == "event"] == [
        "stopped before its first checkpoint, begun again"
    ]
    steps = [line for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines() if '"kind": "step"' in line]
    assert len(steps) == sum(event["kind"] == "step" for event in told)


def test_an_adapter_without_a_run_is_not_trained_over(tmp_path):
    """`begins again` is for a folder that holds nothing learnt; this one holds somebody's adapter."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="no checkpoint to resume from"):
        learn(tmp_path, resume=True)


def test_there_is_nothing_to_resume_without_a_folder():
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec())
        with pytest.raises(RunFolderError, match="no run folder to resume from"):
            train(bank, {"a": Run()}, random_corpus([5, 5]), resume=True)
