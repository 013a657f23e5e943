"""An engine begins, changes its adapters between steps, refuses, survives what goes wrong, and ends."""

from __future__ import annotations

import threading

import pytest
import torch

from rankwise.errors import BankError, ModelError, QueueFullError, RequestError
from rankwise.serving.engine import Engine
from rankwise.serving.requests import Finished, Sampling, Token, Wanted
from rankwise.surgery.bank import Bank
from tests.grid import spec, trained
from tests.models import tiny
from tests.serving.test_engine import Answer, answered, generated, held, prompt, serving, wanted


@pytest.fixture
def bank() -> Bank:
    return held("llama")


def test_adapters_come_go_and_change_between_steps(bank):
    with serving(bank) as engine:
        long = Answer()
        engine.submit(wanted("a0", prompt(0, 9), 90), long)
        assert long.begun.wait(60)

        def change() -> None:
            bank.remove("a1")
            trained(bank, "a1", spec("all-linear", rank=5), seed=77)
            trained(bank, "b", spec(("embed_tokens", "lm_head"), rank=2), seed=78)

        engine.between_steps(change).result(60)
        got = answered(engine, [wanted("a1", prompt(1, 9), 8), wanted("b", prompt(2, 9), 8)])
        long.ended()
    assert got == [generated(bank, "a1", prompt(1, 9), 8), generated(bank, "b", prompt(2, 9), 8)]
    assert long.ids == generated(bank, "a0", prompt(0, 9), 90)


def test_work_that_fails_is_told_to_who_asked(bank):
    with serving(bank) as engine:
        with pytest.raises(BankError, match="no adapter 'nobody'"):
            engine.between_steps(lambda: bank.remove("nobody")).result(60)
        got = answered(engine, [wanted("a0", prompt(1, 9), 5)])
    assert got == [generated(bank, "a0", prompt(1, 9), 5)]


def test_an_adapter_in_use_that_goes_ends_its_answers_and_no_others(bank):
    with serving(bank) as engine:
        gone, stays = Answer(), Answer()
        engine.submit(wanted("a0", prompt(0, 9), 90), gone)
        engine.submit(wanted("a1", prompt(0, 9), 90), stays)
        assert gone.begun.wait(60)
        assert engine.in_use() == {"a0", "a1"}
        engine.between_steps(lambda: bank.remove("a0")).result(60)
        assert gone.ended() == Finished("error", "adapter 'a0' was taken away")
        assert stays.ended() == Finished("length")
    assert stays.ids == generated(bank, "a1", prompt(0, 9), 90)


def test_a_merged_adapter_is_served_alone(bank):
    expected = generated(bank, "a0", prompt(1, 9), 12)
    bank.merge("a0")
    with serving(bank) as engine:
        assert answered(engine, [wanted("a0", prompt(1, 9), 12)]) == [expected]
        other = Answer()
        engine.submit(wanted("a1", prompt(1, 9), 12), other)
        assert other.ended().reason == "error"
        engine.between_steps(bank.unmerge).result(60)
        got = answered(engine, [wanted("a1", prompt(1, 9), 5)])
    assert got == [generated(bank, "a1", prompt(1, 9), 5)]


def test_a_step_that_fails_ends_its_answers_and_the_engine_lives(bank):
    with serving(bank, max_batch_tokens=64) as engine:
        first, second = Answer(), Answer()

        def listening(what: Token | Finished) -> None:
            first(what)
            if second.begun.is_set():  # in the engine's thread: the next step of both meets a layer that breaks
                bank.model.model.norm.weight.requires_grad_(False).set_(torch.ones(3))

        own = bank.model.model.norm.weight.detach().clone()
        engine.submit(wanted("a0", prompt(0, 20), 50), listening)
        engine.submit(wanted("a1", prompt(0, 20), 50), second)
        assert first.ended().reason == second.ended().reason == "error"
        assert "size" in first.ended().message
        assert engine.figures["failed_steps"] == 1
        engine.between_steps(lambda: bank.model.model.norm.weight.set_(own)).result(60)
        got = answered(engine, [wanted("a0", prompt(0, 20), 5)])
        assert engine.figures["prefix_hit_tokens"] == 0  # what a failed step left behind is not found again
    assert got == [generated(bank, "a0", prompt(0, 20), 5)]


def test_a_row_that_is_no_number_ends_alone(bank):
    with torch.no_grad():
        next(p for name, p in bank.named_parameters("a2") if name.endswith("B")).fill_(torch.nan)
    with serving(bank) as engine:
        bad, good = Answer(), Answer()
        engine.submit(wanted("a2", prompt(0, 9), 9), bad)
        engine.submit(wanted("a1", prompt(0, 9), 9), good)
        assert bad.ended() == Finished("error", "the model's logits are not finite")
        assert good.ended() == Finished("length")
    assert good.ids == generated(bank, "a1", prompt(0, 9), 9)


def test_a_listener_that_fails_is_left(bank):
    def bad(what: Token | Finished) -> None:
        raise ConnectionError("gone")

    with serving(bank) as engine:
        engine.submit(wanted("a0", prompt(0, 9), 50), bad)
        got = answered(engine, [wanted("a1", prompt(0, 9), 5)])
    assert got == [generated(bank, "a1", prompt(0, 9), 5)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Wanted((), "a0"), "an empty prompt"),
        (Wanted((97,), "a0"), "beyond the model's 97"),
        (Wanted((-1,), None), "beyond the model's 97"),
        (Wanted((5,), None, max_new_tokens=0), "max_new_tokens is 0"),
        (Wanted((5,) * 100, None, max_new_tokens=29), "100 tokens of prompt and 29 of answer are more than .* 128"),
        (Wanted((5,) * 60, None, max_new_tokens=21), "do not fit the cache of 64 tokens"),
        (Wanted((5,), "a9"), "no adapter 'a9'"),
        (Wanted((5,), None, Sampling(-1.0)), "temperature is -1.0"),
        (Wanted((5,), None, Sampling(float("nan"))), "temperature is nan"),
        (Wanted((5,), None, Sampling(1.0, 0.0, -2, -3, -4)), "top_p is 0.0.*top_k is -2.*seed is -3.*logprobs is -4"),
    ],
)
def test_what_can_never_be_answered_is_refused_at_once(bank, asked, said):
    with serving(bank, cache_bytes=4 * 16 * 256) as engine, pytest.raises(RequestError, match=said):
        engine.submit(asked, Answer())


def test_too_many_wait_outside(bank):
    with serving(bank, max_waiting=1, cache_bytes=8 * 16 * 256) as engine:
        running, waiting = Answer(), Answer()
        ticket = engine.submit(wanted("a0", prompt(0, 20), 100), running)
        assert running.begun.wait(60)
        engine.submit(wanted("a0", prompt(0, 20), 100), waiting)
        with pytest.raises(QueueFullError, match="1 requests are waiting already"):
            engine.submit(wanted("a0", prompt(0, 20), 100), Answer())
        ticket.cancel()
        assert running.ended() == Finished("cancelled")
        assert waiting.ended() == Finished("length")


def test_draining_lets_everybody_finish_and_nobody_in(bank):
    with serving(bank) as engine:
        answer = Answer()
        engine.submit(wanted("a0", prompt(0, 9), 60), answer)
        assert engine.drain(60)
        assert answer.end == Finished("length")
        with pytest.raises(QueueFullError, match="takes no more"):
            engine.submit(wanted("a0", prompt(0, 9), 5), Answer())


def test_draining_gives_up_and_stopping_tells(bank):
    with serving(bank) as engine:
        answer = Answer()
        engine.submit(wanted("a0", prompt(0, 9), 110), answer)
        assert not engine.drain(0)
    assert answer.ended() == Finished("cancelled", "the engine was stopped")


def test_it_can_be_started_again_and_is_refused_before(bank):
    engine, expected = Engine(bank, cache_bytes=1 << 20), generated(bank, "a0", prompt(0, 9), 5)
    with pytest.raises(QueueFullError, match="not running"):
        engine.submit(wanted("a0", prompt(0, 9), 5), Answer())
    assert engine.between_steps(lambda: 5).result(1) == 5
    for _ in range(2):
        engine.start()
        assert answered(engine, [wanted("a0", prompt(0, 9), 5)]) == [expected]
        engine.stop()


def test_a_model_that_cannot_be_served_is_refused_with_a_reason_and_left_as_it_was():
    bank = Bank(tiny("bert"))
    with pytest.raises(ModelError, match=r"BertForMaskedLM cannot be served"):
        Engine(bank).start()
    assert not any(thread.name == "rankwise-engine" for thread in threading.enumerate())
    trained(bank, "a", spec(("query",)))


def test_a_cache_that_holds_nothing_is_refused(bank):
    with pytest.raises(RequestError, match="holds no block"):
        Engine(bank, cache_bytes=100).start()
