import time
import tracemalloc

import numpy as np
import pytest

from rankwise.data.tokeniser import Draft, Piece, Tokeniser, add_tokens
from rankwise.errors import SpecError
from tests.data.chat import byte_level, metaspace, words


def text(draft_text, **kind):
    return Draft((Piece(draft_text, ((0, len(draft_text)),)),), **kind)


def test_a_token_that_holds_text_of_a_stretch_is_trained():
    tokeniser = Tokeniser(byte_level())
    (document,) = tokeniser.encode([Draft((Piece("hello world, hello", ((5, 11),)),))])
    kept = document.tokens[document.supervised]
    assert tokeniser.tokenizer.decode(kept) == " world"


def test_the_characters_of_one_chinese_letter_in_several_tokens_are_all_trained():
    tokeniser = Tokeniser(byte_level())
    (document,) = tokeniser.encode([Draft((Piece("a鑫b", ((1, 2),)),))])
    assert document.supervised.tolist() == [False, True, True, True, False]


def test_pieces_are_tokenised_each_by_itself():
    tokeniser = Tokeniser(byte_level())
    (document,) = tokeniser.encode([Draft((Piece("hel"), Piece("lo", ((0, 2),))))])
    assert document.tokens.tolist() == tokeniser.ids("hel") + tokeniser.ids("lo") != tokeniser.ids("hello")


def test_splitting_keeps_every_character_and_every_stretch():
    piece = Piece("abcdefgh", ((2, 4), (5, 8)))
    assert piece.split([2, 5]) == (Piece("ab"), Piece("cde", ((0, 2),)), Piece("fgh", ((0, 3),)))
    assert piece.split([]) == (piece,)
    assert "".join(part.text for part in piece.split([0, 8])) == piece.text


def test_cutting_keeps_the_beginning():
    draft = Draft((Piece("abc"), Piece("defg", ((1, 4),))), opened=True, closed=True)
    assert draft.cut(5) == Draft((Piece("abc"), Piece("de", ((1, 2),))), opened=True)
    assert draft.cut(2) == Draft((Piece("ab"), Piece("")), opened=True)


@pytest.mark.parametrize("kind", [byte_level, metaspace, words])
def test_added_tokens_are_whole_wherever_they_stand_and_are_shown(kind):
    tokenizer = kind()
    ids = add_tokens(tokenizer, ["<tool>", "two words", "工具"])
    assert ids == tuple(range(len(tokenizer) - 3, len(tokenizer)))
    for text, token in zip(("<tool>", "two words", "工具"), ids, strict=True):
        assert Tokeniser(tokenizer).ids(f"a{text}b").count(token) == 1
        assert text in tokenizer.decode([token], skip_special_tokens=True)


def test_added_tokens_make_another_tokenizer():
    before, tokenizer = Tokeniser(byte_level()).digest, byte_level()
    add_tokens(tokenizer, ["<tool>"])
    assert Tokeniser(tokenizer).digest != before


def test_tokens_that_are_there_are_not_added_and_nothing_is():
    tokenizer = byte_level()
    with pytest.raises(SpecError, match=r"'a' is one already \(number \d+\)"):
        add_tokens(tokenizer, ["<tool>", "a"])
    assert len(tokenizer) == len(byte_level())


@pytest.mark.parametrize(
    ("tokenizer", "splittable", "opening"),
    [
        (byte_level(), True, ()),
        (byte_level(bos=True), True, (1,)),
        (metaspace(), False, (1,)),
        (metaspace(bos=False), False, ()),
        (words(), False, ()),
    ],
    ids=["bytes", "bytes with BOS", "spaces with BOS", "spaces", "words"],
)
def test_what_a_tokenizer_does_by_itself_is_found_out(tokenizer, splittable, opening):
    tokeniser = Tokeniser(tokenizer)
    assert (tokeniser.splittable, tokeniser.opening) == (splittable, opening)


def test_with_a_limit_the_tokens_up_to_it_are_the_same():
    tokeniser = Tokeniser(byte_level(bos=True))
    sentence = "the quick brown fox 你好 " * 2000
    (whole,), (part,) = (tokeniser.encode([text(sentence, opened=True, closed=True)], most) for most in (None, 50))
    assert whole.whole
    assert not part.whole
    assert 50 < len(part.tokens) < len(whole.tokens)
    assert np.array_equal(part.tokens[:50], whole.tokens[:50])


def test_with_a_limit_short_texts_stay_whole():
    tokeniser = Tokeniser(byte_level())
    short, long = text("hello", closed=True), text("hello " * 5000, closed=True)
    assert [document.whole for document in tokeniser.encode([short, long, short], 10)] == [True, False, True]


@pytest.mark.parametrize(
    "huge", ["a" * 10_000_000, "word " * 1_000_000, "世界" * 1_000_000], ids=["word", "words", "chinese"]
)
def test_a_huge_text_takes_little_time_and_memory(huge):
    tokeniser = Tokeniser(byte_level())
    tracemalloc.start()
    begun = time.monotonic()
    (document,) = tokeniser.encode([text(huge, closed=True)], 1024)
    assert time.monotonic() - begun < 5
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()
    assert len(document.tokens) > 1024
    assert not document.whole


def test_nothing_to_encode():
    tokeniser = Tokeniser(byte_level())
    assert tokeniser.encode([]) == []
    (document,) = tokeniser.encode([Draft((Piece(""),))])
    assert len(document.tokens) == len(document.supervised) == 0
