"""Text that is sent in pieces is, put together, what the tokenizer makes of all tokens, up to the first stop."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.serving.answer import Answer, token_bytes
from rankwise.serving.requests import Token
from tests.data.chat import byte_level

TOKENIZER = byte_level(None)
TEXTS = st.text(alphabet="abc <>\n你好é🙂", max_size=24)


def told(tokens, until=(), ends=()):
    answer = Answer(TOKENIZER, frozenset(ends), until)
    pieces = [answer.hear(Token(token)) for token in tokens]
    return answer, [*pieces, answer.end()]


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_any_tokens_at_all(tokens):
    _, pieces = told(tokens)
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert [said.token.id for piece in pieces for said in piece.tokens] == tokens


@given(TEXTS)
def test_no_character_is_ever_split(text):
    _, pieces = told([token for byte in text for token in TOKENIZER.encode(byte, add_special_tokens=False)])
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces) == text


@given(TEXTS, st.lists(st.text(alphabet="abc <", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_the_stop_that_is_complete_first_ends_it_however_the_tokens_lie(text, until, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)) | {0, len(text)})
    parts = [text[a:b] for a, b in pairwise(cuts)]
    answer, pieces = told([t for part in parts for t in TOKENIZER.encode(part, add_special_tokens=False)], until)
    ends = [(found.end(1), found.start()) for stop in until for found in re.finditer(f"(?=({re.escape(stop)}))", text)]
    assert answer.stopped == bool(ends)
    sent = "".join(piece.text for piece in pieces)
    assert sent == (text[: min(ends)[1]] if ends else text)


def test_text_is_not_held_back_longer_than_it_must_be():
    tokens = [TOKENIZER.encode(c, add_special_tokens=False)[0] for c in "ab<b<c"]
    _, pieces = told(tokens, until=["<c"])
    assert [piece.text for piece in pieces] == ["a", "b", "", "<b", "", "", ""]


def test_an_end_is_counted_and_not_told():
    a, end = (TOKENIZER.encode(c, add_special_tokens=False)[0] for c in "a\n")
    answer, pieces = told([a, end], ends=[end])
    assert ("".join(piece.text for piece in pieces), answer.count) == ("a", 2)


@pytest.mark.parametrize("text", ["a 你好 é", "🙂"])
def test_bytes_of_tokens_are_those_of_the_text(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert bytes(byte for token in ids for byte in token_bytes(TOKENIZER, token) or ()).decode() == text
