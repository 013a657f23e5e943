import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.order import Order, cut, micro_batches, padded_batches

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(np.array)


@given(LENGTHS, st.integers(0, 5), st.integers(1, 120))
def test_an_epoch_has_every_document_once_and_no_step_is_too_large(lengths, seed, batch_tokens):
    order = Order(lengths, seed, batch_tokens)
    for epoch in range(2):
        steps = order.epoch(epoch)
        assert sorted(np.concatenate(steps)) == list(range(len(lengths)))
        assert all(len(step) == 1 or lengths[step].sum() <= batch_tokens for step in steps)


@given(LENGTHS, st.integers(1, 9))
def test_steps_can_be_counted_in_documents(lengths, size):
    steps = Order(lengths, 0, 1, size).epoch(0)
    assert [len(step) for step in steps[:-1]] == [size] * (len(steps) - 1)


def test_the_order_follows_from_seed_and_step_alone():
    lengths = np.arange(1, 40)
    one, other = Order(lengths, 3, 60), Order(lengths, 3, 60)
    far = [one.step(n)[1] for n in range(60)]
    assert all(np.array_equal(other.step(n)[1], far[n]) for n in (59, 7, 30))
    assert not np.array_equal(np.concatenate(Order(lengths, 4, 60).epoch(0)), np.concatenate(one.epoch(0)))
    assert not np.array_equal(np.concatenate(one.epoch(1)), np.concatenate(one.epoch(0)))


def test_steps_of_whole_and_broken_epochs():
    order = Order(np.full(10, 5), 0, 10)
    assert [order.steps(e) for e in (1, 2, 0.5, 1.1, 0.01)] == [5, 10, 3, 6, 1]
    assert order.step(5)[0] == 1


@given(LENGTHS, st.integers(1, 120))
def test_micro_batches_share_out_a_step(lengths, micro_tokens):
    documents = np.arange(len(lengths))[::2]
    micros = micro_batches(documents, lengths, micro_tokens)
    assert sorted(np.concatenate(micros)) == sorted(documents)
    assert all(len(micro) == 1 or lengths[micro].sum() <= micro_tokens for micro in micros)


def test_micro_batches_are_even():
    totals = [10 * len(micro) for micro in micro_batches(np.arange(9), np.full(9, 10), 80)]
    assert sorted(totals) == [40, 50]


@given(LENGTHS, st.integers(1, 120))
def test_padded_rows_fit_too_and_have_the_longest_first(lengths, micro_tokens):
    documents = np.arange(len(lengths))[::2]
    pieces = padded_batches(documents, lengths, micro_tokens)
    assert sorted(np.concatenate(pieces)) == sorted(documents)
    assert all(len(piece) == 1 or len(piece) * lengths[piece].max() <= micro_tokens for piece in pieces)
    inline = lengths[np.concatenate(pieces)]
    assert np.array_equal(inline, -np.sort(-inline))


def test_rows_of_one_length_go_together_and_short_ones_apart_from_long_ones():
    assert len(padded_batches(np.arange(20), np.full(20, 10), 200)) == 1
    lengths = np.array([50] * 8 + [5] * 40)
    pieces = padded_batches(np.arange(48), lengths, 2000)
    assert [sorted(set(lengths[piece].tolist())) for piece in pieces] == [[50], [5]]


def test_a_step_is_cut_as_its_layout_needs_it():
    documents, lengths = np.arange(4), np.array([10, 1, 1, 1])
    assert [len(piece) for piece in cut(documents, lengths, 13, padded=False)] == [4]
    assert [len(piece) for piece in cut(documents, lengths, 13, padded=True)] == [1, 3]
