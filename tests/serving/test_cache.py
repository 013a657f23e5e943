"""Whose a block is, and what is found again: against a plain account of what was published."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.serving.cache import BLOCK, Blocks, blocks_for

TEXT = list(range(5 * BLOCK))


def kept(blocks: Blocks, digest: str, tokens: list[int]) -> list[int]:
    """A request that has come and gone."""
    known, node = blocks.known(digest, tokens)
    own = blocks.taken(known, blocks_for(len(tokens)) - len(known))
    assert own is not None
    for at in range(len(known), len(tokens) // BLOCK):
        node = blocks.publish(own[at], node, tokens[at * BLOCK : (at + 1) * BLOCK])
    blocks.release(own)
    return own


def test_what_was_published_is_found_again_but_for_the_last_token():
    blocks = Blocks(8)
    own = kept(blocks, "d", TEXT[: 2 * BLOCK + 3])
    assert blocks.known("d", TEXT[: 2 * BLOCK + 1])[0] == own[:2]
    assert blocks.known("d", TEXT[: 2 * BLOCK])[0] == own[:1]  # one token at least is computed
    assert blocks.known("d", TEXT[:BLOCK])[0] == []
    assert blocks.available == 8


def test_another_digest_or_another_beginning_is_another_text():
    blocks = Blocks(8)
    own = kept(blocks, "d", TEXT[: 2 * BLOCK + 1])
    assert blocks.known("e", TEXT)[0] == []
    assert blocks.known("d", [99, *TEXT[1:]])[0] == []
    assert blocks.known("d", [*TEXT[:BLOCK], 99, *TEXT[BLOCK + 1 :]])[0] == own[:1]


def test_the_longest_unused_goes_first_and_the_end_of_a_text_before_its_beginning():
    blocks = Blocks(4)
    old, new = TEXT[: 2 * BLOCK], [token + 1000 for token in TEXT[: 2 * BLOCK]]
    kept(blocks, "d", old)
    kept(blocks, "d", new)
    taken = blocks.taken([], 1)
    assert taken is not None
    assert len(blocks.known("d", [*old, 0])[0]) == 1
    assert len(blocks.known("d", [*new, 0])[0]) == 2


def test_there_is_no_more_than_there_is():
    blocks = Blocks(3)
    assert blocks.taken([], 4) is None
    own = blocks.taken([], 2)
    assert own is not None
    assert blocks.taken([], 2) is None
    assert blocks.available == 1
    blocks.release(own)
    assert blocks.available == 3


def test_room_that_holds_what_is_found_is_not_counted_twice():
    blocks = Blocks(3)
    kept(blocks, "d", TEXT[: 2 * BLOCK])
    known, _ = blocks.known("d", TEXT[: 2 * BLOCK + 1])
    assert len(known) == 2
    assert blocks.taken(known, 2) is None
    assert blocks.taken(known, 1) is not None


def test_what_is_spoilt_is_not_found():
    blocks = Blocks(4)
    known, node = blocks.known("d", TEXT)
    own = blocks.taken(known, 2)
    assert own is not None
    blocks.publish(own[0], node, TEXT[:BLOCK])
    blocks.release(own, spoilt=True)
    assert blocks.known("d", TEXT)[0] == []
    assert blocks.available == 4


def test_clear_forgets_what_is_unused():
    blocks = Blocks(4)
    kept(blocks, "d", TEXT[: 3 * BLOCK])
    assert blocks.idle == 3
    blocks.clear()
    assert (blocks.idle, blocks.available) == (0, 4)
    assert blocks.known("d", TEXT)[0] == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("de"), st.integers(0, 2), st.integers(1, 4 * BLOCK)), max_size=25))
def test_whatever_comes_and_goes_blocks_hold_what_they_are_found_for(requests):
    """Texts differ at their first token; a block's content is written down beside and compared with what is found."""
    blocks, content = Blocks(6), {}
    for digest, first, size in requests:
        tokens = [first + 1000, *TEXT[1:size]]
        known, _ = blocks.known(digest, tokens)
        for at, block in enumerate(known):
            assert content[block] == (digest, tuple(tokens[: (at + 1) * BLOCK]))
        own = kept(blocks, digest, tokens)
        assert len(set(own)) == len(own)
        for at in range(len(own)):
            content[own[at]] = (digest, tuple(tokens[: (at + 1) * BLOCK]))
        assert blocks.available == 6
