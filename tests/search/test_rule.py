"""The rule that chooses a rank, on losses whose truth is known."""

import numpy as np
import pytest

from rankwise.search.rule import chosen_in, lowest, smallest, standings
from rankwise.search.statistics import Noise

DOCUMENTS = 400
ITEMS = np.random.default_rng(1).integers(5, 40, size=DOCUMENTS)
QUIET = Noise(1e-12, 10.0)


def losses(*levels, seeds=1, apart=0.02, seed=0):
    """Of candidates whose true losses are these, nats an item; documents differ much, candidates little (`apart`)."""
    generator = np.random.default_rng(seed)
    hard = generator.normal(scale=0.8, size=DOCUMENTS)
    return [
        None if level is None else (level + hard + generator.normal(scale=apart, size=(seeds, DOCUMENTS))) * ITEMS
        for level in levels
    ]


def test_the_smallest_that_is_not_worse_is_chosen():
    found = standings(losses(2.5, 2.02, 2.0, 1.999), ITEMS, gain=2.0, noise=QUIET)
    assert [one.verdict for one in found] == ["worse", "not worse", "not worse", "best"]
    assert smallest(found) == 1
    assert found[1].delta.upper() <= found[1].tolerance == pytest.approx(0.04)


def test_what_few_documents_cannot_tell_is_not_taken_for_enough():
    few = slice(0, 6)
    own = [one[:, few] for one in losses(2.02, 2.0, apart=0.5)]
    found = standings(own, ITEMS[few], gain=0.5, noise=QUIET)
    assert sorted(one.verdict for one in found) == ["best", "cannot tell"]


def test_the_noise_of_seeds_widens_every_difference():
    own = losses(2.005, 2.0)
    quiet, loud = (standings(own, ITEMS, 2.0, noise)[0] for noise in (QUIET, Noise(0.1**2, 4.0)))
    assert (quiet.verdict, loud.verdict) == ("not worse", "cannot tell")
    assert loud.delta.error > 0.1


def test_one_that_failed_is_never_chosen_nor_the_best():
    found = standings(losses(None, 2.1, 2.0), ITEMS, 1.0, QUIET)
    assert [one.verdict for one in found] == ["failed", "worse", "best"]
    assert smallest(found) == 2
    assert chosen_in(losses(None, 2.1, 2.0), ITEMS, 1.0, QUIET)[0] == 0
    assert lowest([None, 3.0, 2.0]) == 2


def test_how_often_each_is_chosen_tells_a_clear_choice_from_a_close_one():
    clear = chosen_in(losses(2.5, 2.0, 1.99), ITEMS, 2.0, QUIET)
    assert clear == [0.0, 1.0, 0.0]
    close = chosen_in(losses(2.039, 2.0, apart=0.3), ITEMS, 2.0, QUIET)
    assert sum(close) == pytest.approx(1)
    assert 0.02 < close[0] < 0.98
    assert close == chosen_in(losses(2.039, 2.0, apart=0.3), ITEMS, 2.0, QUIET), "the same seed, the same answer"


def test_candidates_that_are_the_same_are_rarely_called_worse():
    """A/A: true losses are equal, and so no more than one in twenty may be said to be worse."""
    verdicts = []
    for seed in range(200):
        first, second = losses(2.0, 2.0, apart=0.3, seed=seed)
        verdicts.append(standings([first, second], ITEMS, gain=0.1, noise=None, best=1)[0].verdict)
    assert verdicts.count("worse") <= 200 * 0.05
