import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.order import Order, replayed
from rankwise.data.replay import Replay
from rankwise.errors import SpecError


@given(st.integers(1, 200), st.integers(1, 200), st.floats(0.01, 0.9), st.integers(0, 5))
def test_an_epoch_has_the_share_or_all_there_is_and_none_twice(fresh, documents, share, seed):
    replay = Replay(documents=documents, share=share)
    drawn = replayed(replay, 0, fresh, seed)
    assert len(set(drawn)) == len(drawn) == replay.count(fresh)
    assert all(fresh <= number < fresh + documents for number in drawn)
    if len(drawn) < documents and len(drawn) > 1:
        assert len(drawn) / (len(drawn) + fresh) == pytest.approx(share, abs=0.5 / fresh + 1e-9)


def test_all_old_documents_come_before_any_comes_again():
    replay = Replay(documents=20, share=0.2)
    epochs = [replayed(replay, epoch, 20, 0) for epoch in range(8)]
    assert [len(epoch) for epoch in epochs] == [5] * 8
    for four in (epochs[:4], epochs[4:]):
        assert sorted(np.concatenate(four)) == list(range(20, 40))
    assert not np.array_equal(replayed(replay, 0, 20, 1), epochs[0])


def test_an_order_mixes_them_into_its_steps_and_follows_from_the_step_alone():
    lengths, replay = np.full(60, 5), Replay(documents=30, share=0.25)
    one, other = (Order(lengths, 3, 40, replay=replay) for _ in range(2))
    for epoch in range(3):
        found = np.concatenate(one.epoch(epoch))
        assert sorted(found[found < 30]) == list(range(30))
        assert sorted(found[found >= 30]) == sorted(replayed(replay, epoch, 30, 3))
        assert len(found) == 40
    assert any((step < 30).any() and (step >= 30).any() for step in one.epoch(0))
    assert np.array_equal(other.step(14)[1], one.step(14)[1])


def test_without_old_documents_the_order_is_what_it_was():
    lengths = np.full(9, 5)
    first = np.random.Generator(np.random.PCG64([2, 0])).permutation(9)
    assert np.array_equal(np.concatenate(Order(lengths, 2, 10).epoch(0)), first)


def test_a_share_is_between_nothing_and_all():
    with pytest.raises(SpecError):
        Replay(documents=3, share=1.0)
