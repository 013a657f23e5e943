"""Blocks by number: one spelling for many, and the block a layer stands in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.adapters.blocks import block_of, holds, lacking, read_blocks
from rankwise.adapters.spec import LoraSpec
from rankwise.errors import SpecError

NUMBERS = st.sets(st.integers(0, 40))


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("model.layers.3.mlp.up_proj", 3),
        ("layers.12.attention.q_proj", 12),
        ("encoder.block.1.layer.0.SelfAttention.q", 1),  # T5 numbers the parts of a block too
        ("model.layers.5.mlp.experts.7.w1", 5),
        ("down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_q", 2),
        ("model.visual.merger.mlp.0", None),  # a layer in a row of layers
        ("classifier.2", None),
        ("0.linear", None),
        ("lm_head", None),
        ("model.layers2.0", None),
    ],
)
def test_the_first_number_between_a_name_and_a_layer_is_the_block(path, number):
    assert block_of(path) == number


@given(NUMBERS)
def test_any_numbers_survive_being_written(numbers):
    written = read_blocks(tuple(numbers))
    assert read_blocks(written) == written
    if numbers:
        assert {n for n in range(60) if holds(written, f"model.layers.{n}.q_proj")} == numbers
    assert not holds(written or "0", "lm_head")


@given(NUMBERS, NUMBERS)
def test_numbers_that_are_not_there_are_told(numbers, there):
    assert lacking(read_blocks(tuple(numbers)), there) == read_blocks(tuple(numbers - there))


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("0-11,20", "0-11,20"),
        (" 20 , 3 - 5,4-7,0", "0,3-7,20"),
        ("16-", "16-"),
        ("16-,20-30,14", "14,16-"),
        ("2–4", "2-4"),  # as reports write it
        ("", ""),
        (5, "5"),
        (range(3), "0-2"),
        ([7, 6], "6-7"),
    ],
)
def test_every_way_to_say_it_is_one(asked, written):
    assert LoraSpec(layers=asked).layers == written


def test_without_an_end_it_reaches_to_the_last_and_needs_one_at_least():
    assert [n for n in range(5) if holds("1,3-", f"h.{n}.attn.q")] == [1, 3, 4]
    assert lacking("1,3-", {0, 1, 4}) == ""
    assert lacking("1,3-", {0, 1, 2}) == "3-"


def test_no_blocks_named_is_every_layer():
    assert holds("", "lm_head")
    assert holds("", "model.layers.0.q_proj")


@pytest.mark.parametrize(
    "asked", ["-3", "-1", -1, (0, -2), "3-1", "a", "0..3", "1-2-3", 1.0, (1, "2"), True, "4096", ","]
)
def test_what_names_no_blocks_is_refused_with_an_example(asked):
    with pytest.raises(SpecError, match=r"layers = .*(counted from 0|0-11,20 or 16-)"):
        LoraSpec(layers=asked)
