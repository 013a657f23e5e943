"""The law of serving: what a request is answered does not depend on who is answered beside it.

What it should be answered is found by transformers' `generate`, through one adapter alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.serving.engine import Engine
from rankwise.serving.requests import Finished, Sampling, Token, Wanted
from rankwise.surgery.bank import Bank
from tests.grid import spec, trained
from tests.models import ARCHITECTURES, CAUSAL, VOCAB, tiny

NAMES = (None, "a0", "a1", "a2")


class Answer:
    """Listens to one request."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.end: Finished | None = None
        self._over = threading.Event()
        self.begun = threading.Event()

    def __call__(self, what: Token | Finished) -> None:
        assert self.end is None  # nothing follows the end
        if isinstance(what, Token):
            self.tokens.append(what)
            self.begun.set()
        else:
            self.end = what
            self._over.set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def ended(self) -> Finished:
        assert self._over.wait(60)
        assert self.end is not None
        return self.end


@contextmanager
def serving(bank: Bank, **settings: Any) -> Iterator[Engine]:
    engine = Engine(bank, **{"max_batch_tokens": 24, "cache_bytes": 1 << 20, **settings})
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def wanted(name: str | None, prompt: list[int], count: int, **named: Any) -> Wanted:
    return Wanted(tuple(prompt), name, max_new_tokens=count, digest=name or "", **named)


def generated(bank: Bank, name: str | None, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with bank.use(name), torch.no_grad():
        out = bank.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def prompt(seed: int, size: int) -> list[int]:
    return torch.randint(3, VOCAB, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


def held(architecture: str, dtype: torch.dtype = torch.float32, **named: Any) -> Bank:
    bank = Bank(tiny(architecture, dtype))
    for seed, name in enumerate(NAMES[1:]):
        trained(bank, str(name), spec(ARCHITECTURES[architecture].targets, **named), seed)
    return bank


def answered(engine: Engine, requests: list[Wanted]) -> list[list[int]]:
    answers = [Answer() for _ in requests]
    for request, answer in zip(requests, answers, strict=True):
        engine.submit(request, answer)
    assert {answer.ended().reason for answer in answers} == {"length"}
    return [answer.ids for answer in answers]


@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_mixture_is_answered_as_each_is_alone(architecture):
    """Prompts longer than a step, of unequal length, adapters and base in one batch, more requests than have room."""
    bank = held(architecture)
    jobs = [(NAMES[i % 4], prompt(i, 5 + 4 * i), 10 + i) for i in range(9)]
    expected = [generated(bank, *job) for job in jobs]
    token = 4 * 2 * 2 * 32  # at least: two layers' keys and values
    with serving(bank, cache_bytes=16 * 12 * token) as engine:
        assert answered(engine, [wanted(*job) for job in jobs]) == expected
        assert engine.figures["running"] == engine.figures["waiting"] == 0
    assert [generated(bank, *job) for job in jobs[:2]] == expected[:2]  # and the model is as it was


@pytest.mark.parametrize("form", ["dora", "adalora"])
def test_forms(form):
    bank = held("llama", form=form)
    jobs = [(NAMES[i % 4], prompt(i, 6 + i), 12) for i in range(6)]
    expected = [generated(bank, *job) for job in jobs]
    with serving(bank) as engine:
        assert answered(engine, [wanted(*job) for job in jobs]) == expected


def test_the_plain_path_gives_the_same():
    """Float64 is not compiled."""
    bank = held("llama", torch.float64)
    jobs = [(NAMES[i % 4], prompt(i, 6 + 5 * i), 12) for i in range(6)]
    expected = [generated(bank, *job) for job in jobs]
    with serving(bank) as engine:
        assert answered(engine, [wanted(*job) for job in jobs]) == expected


@pytest.fixture(scope="module")
def bank() -> Bank:
    return held("llama")


JOBS = [(NAMES[i % 4], prompt(i // 2, 4 + 9 * (i % 5)), 3 + 2 * (i % 7)) for i in range(14)]


@pytest.fixture(scope="module")
def alone(bank) -> list[list[int]]:
    return [generated(bank, *job) for job in JOBS]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(len(JOBS))),
    cancelled=st.sets(st.integers(0, len(JOBS) - 1), max_size=4),
    pauses=st.sets(st.integers(0, len(JOBS) - 1), max_size=4),
    most=st.integers(3, 40),
    blocks=st.integers(5, 40),
)
def test_whatever_the_order_and_whoever_leaves(bank, alone, order, cancelled, pauses, most, blocks):
    answers = {i: Answer() for i in order}
    with serving(bank, max_batch_tokens=most, cache_bytes=blocks * 16 * 256) as engine:
        tickets = {}
        for i in order:
            if i in pauses and tickets:
                answers[next(iter(tickets))].ended()
            tickets[i] = engine.submit(wanted(*JOBS[i]), answers[i])
            if i in cancelled:
                tickets[i].cancel()
        for i in order:
            end = answers[i].ended()
            assert end.reason == "length" or (end.reason == "cancelled" and i in cancelled)
            expected = alone[i] if end.reason == "length" else alone[i][: len(answers[i].ids)]
            assert answers[i].ids == expected
        assert engine.figures["cached_tokens"] == 0


def test_what_prompts_have_in_common_is_computed_once_for_each_adapter(bank):
    system = prompt(50, 40)
    jobs = [(name, system + prompt(i, 5), 6) for i in range(3) for name in (None, "a0")]
    expected = [generated(bank, *job) for job in jobs]
    with serving(bank, max_batch_tokens=64) as engine:
        assert answered(engine, [wanted(*job) for job in jobs]) == expected
        assert engine.figures["prefix_hit_tokens"] == 4 * 32
        assert engine.figures["prompt_tokens"] == 6 * 45 - 4 * 32
        answered(engine, [Wanted(tuple(system), "a0", max_new_tokens=2)])
        assert engine.figures["prefix_hit_tokens"] == 4 * 32  # of weights without a name nothing is shared


def test_what_was_answered_is_a_beginning_too(bank):
    first = prompt(60, 10)
    with serving(bank) as engine:
        (said,) = answered(engine, [wanted("a1", first, 30)])
        longer = first + said + prompt(61, 4)
        got = answered(engine, [wanted("a1", longer, 5)])
        assert engine.figures["prefix_hit_tokens"] == 32
    assert got == [generated(bank, "a1", longer, 5)]


def test_a_stop_ends_an_answer(bank):
    expected = generated(bank, "a0", prompt(1, 9), 20)
    stop = expected[6]
    answer = Answer()
    with serving(bank) as engine:
        engine.submit(wanted("a0", prompt(1, 9), 20, stops=frozenset({stop})), answer)
        assert answer.ended() == Finished("stop")
    assert answer.ids == expected[: expected.index(stop) + 1]


def test_chance_is_a_requests_own(bank):
    drawing = {"sampling": Sampling(1.0, 0.95, 40, seed=7, logprobs=2)}
    one = wanted("a0", prompt(1, 9), 12, **drawing)
    alone, beside = Answer(), Answer()
    with serving(bank) as engine:
        engine.submit(one, alone)
        alone.ended()
        for i in range(5):
            engine.submit(wanted(NAMES[i % 4], prompt(i, 20), 15, sampling=Sampling(1.5)), Answer())
        engine.submit(one, beside)
        beside.ended()
    assert beside.ids == alone.ids
    assert all(len(token.top) == 2 for token in alone.tokens)
    for a, b in zip(alone.tokens, beside.tokens, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
