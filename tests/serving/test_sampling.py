"""Which token comes: against the distribution written out in float64, and whatever the neighbours ask."""

import numpy as np
import pytest
import torch

from rankwise.serving.requests import Sampling, Token
from rankwise.serving.sampling import sampled

WORDS = 50


def logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, WORDS, generator=torch.Generator().manual_seed(1)) * 2


def drawn(wanted: Sampling, times: int, row: torch.Tensor) -> np.ndarray:
    """How often each word comes."""
    chance = np.random.default_rng(0)
    said = sampled(row.expand(times, -1), [wanted] * times, [chance] * times)
    return np.bincount([token.id for token in said if token is not None], minlength=WORDS) / times


def expected(wanted: Sampling, row: torch.Tensor) -> np.ndarray:
    p = (row.double() / wanted.temperature).softmax(-1).numpy()
    order = np.argsort(-p)
    order = order[: wanted.top_k] if wanted.top_k else order
    kept = p[order] / p[order].sum()
    order = order[: int((np.cumsum(kept) < wanted.top_p).sum()) + 1]
    found = np.zeros(WORDS)
    found[order] = p[order] / p[order].sum()
    return found


def test_greedy_is_the_likeliest():
    rows = logits(4)
    said = sampled(rows, [Sampling()] * 4, [np.random.default_rng(0)] * 4)
    assert [token.id for token in said if token] == rows.argmax(-1).tolist()


@pytest.mark.parametrize(
    "wanted",
    [Sampling(1.0), Sampling(0.5), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.6), Sampling(2.0, 0.8, 5)],
    ids=str,
)
def test_words_come_as_often_as_they_should(wanted):
    row = logits()[0]
    found, want = drawn(wanted, 4000, row), expected(wanted, row)
    assert np.abs(found - want).max() < 4 * 0.5 / 4000**0.5
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(want))


def test_the_shortlist_is_left_where_it_is_too_short():
    row = torch.zeros(1, 5000)
    said = sampled(row.expand(300, -1), [Sampling(1.0, top_p=0.9)] * 300, [np.random.default_rng(1)] * 300)
    words = {token.id for token in said if token}
    assert len(words) > 250
    assert max(words) < 4501


def test_a_row_does_not_depend_on_what_its_neighbours_ask():
    rows, wanted = logits(3), Sampling(0.9, 0.9, 20, logprobs=2)
    alone = sampled(rows[1:2], [wanted], [np.random.default_rng(5)])
    others = [Sampling(), wanted, Sampling(1.5)]
    chances = [np.random.default_rng(i) for i in (1, 5, 2)]
    assert sampled(rows, others, chances)[1] == alone[0]


def test_one_number_is_drawn_a_token_and_none_when_greedy():
    chance, other = np.random.default_rng(3), np.random.default_rng(3)
    sampled(logits(), [Sampling()], [chance])
    assert chance.random() == other.random()
    sampled(logits(), [Sampling(1.0)], [chance])
    other.random()
    assert chance.random() == other.random()


def test_a_very_cold_or_a_single_word_is_the_likeliest():
    row = logits()
    best = int(row.argmax())
    for wanted in (Sampling(1e-6), Sampling(5.0, top_k=1), Sampling(5.0, top_p=1e-9)):
        said = sampled(row, [wanted], [np.random.default_rng(0)])
        assert said[0] is not None
        assert said[0].id == best


def test_logprobs_are_the_models_own():
    row = logits()
    own = row[0].double().log_softmax(-1)
    (said,) = sampled(row, [Sampling(0.7, logprobs=4)], [np.random.default_rng(2)])
    assert isinstance(said, Token)
    assert said.logprob == pytest.approx(float(own[said.id]), abs=1e-5)
    values, words = own.topk(4)
    assert [word for word, _ in said.top] == words.tolist()
    assert [value for _, value in said.top] == pytest.approx(values.tolist(), abs=1e-5)
    (said,) = sampled(row, [Sampling(logprobs=0)], [np.random.default_rng(2)])
    assert said is not None
    assert said.top == ()
    assert said.logprob is not None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_is_told_and_the_others_go_on(bad):
    rows = logits(3)
    rows[1, 7] = bad
    said = sampled(rows, [Sampling(1.0)] * 3, [np.random.default_rng(i) for i in range(3)])
    assert said[1] is None
    assert said[0] is not None
    assert said[2] is not None
