import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.conversations import SHAPES, Conversation, Text, read_document, shape_of
from rankwise.data.problems import Problems
from rankwise.data.row import Origin, Row
from rankwise.errors import DataError

ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(fields):
    problems = Problems()
    document = read_document(Row(Origin("x.jsonl", 7), fields), problems)
    problems.check()
    return document


def failure(fields) -> str:
    problems = Problems()
    assert read_document(Row(Origin("x.jsonl", 7), fields), problems) is None
    with pytest.raises(DataError) as caught:
        problems.check()
    return str(caught.value)


# Shapes


def test_messages_keep_what_templates_may_want():
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    turns = [
        {"role": "system", "content": "s"},
        ASKED | {"name": "ann"},
        {"role": "assistant", "tool_calls": call, "content": None},
        {"role": "tool", "content": "1", "tool_call_id": None},
        SAID,
    ]
    document = read({"messages": turns, "tools": [{"name": "f"}], "id": 5})
    assert document == Conversation(
        (turns[0], turns[1], {"role": "assistant", "tool_calls": call}, {"role": "tool", "content": "1"}, SAID),
        tools=({"name": "f"},),
    )
    assert document.trained == [2, 4]


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "one"}, {"text": "two"}]
    document = read({"messages": [{"role": "user", "content": parts}, SAID]})
    assert document.messages[0]["content"] == "one\ntwo"


def test_sharegpt_speakers_get_their_roles():
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("observation", "o"), ("function_call", "f"), ("user", "u")]
    document = read({"conversations": [{"from": who, "value": what} for who, what in turns], "system": "", "id": "x"})
    roles = ["system", "user", "assistant", "tool", "assistant", "user"]
    assert [(turn["role"], turn["content"]) for turn in document.messages] == [
        (role, what) for role, (_, what) in zip(roles, turns, strict=True)
    ]


def test_a_system_column_becomes_the_first_turn():
    for fields in (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
    ):
        assert read({**fields, "system": "be kind"}).messages == ({"role": "system", "content": "be kind"}, ASKED, SAID)


def test_prompt_and_completion():
    document = read({"prompt": "q", "completion": "a", "label": 3})
    assert document == Conversation((ASKED, SAID), prompt="q")
    assert read({"prompt": "", "completion": "a"}).prompt == ""


def test_prompt_and_completion_as_turns_train_the_completion_only():
    document = read({"prompt": [ASKED, SAID, ASKED], "completion": [SAID, ASKED, SAID]})
    assert document.messages == (ASKED, SAID, ASKED, SAID, ASKED, SAID)
    assert document.trained == [3, 5]
    assert document.prompt is None


@pytest.mark.parametrize("given", ["", None, "   "])
def test_alpaca_without_input(given):
    document = read({"instruction": "Do it.", "input": given, "output": "a"})
    assert document.messages[0]["content"] == "Do it."
    assert document.prompt == "Do it.\n\n"


def test_alpaca_with_input_system_and_history():
    fields = {
        "instruction": "Do it.",
        "input": "x",
        "output": "a",
        "text": "the formatted row",
        "history": [["b", "c"]],
    }
    document = read(fields)
    turns = [("user", "b"), ("assistant", "c"), ("user", "Do it.\n\nx"), ("assistant", "a")]
    assert [(turn["role"], turn["content"]) for turn in document.messages] == turns
    assert document.trained == [3]
    assert document.prompt == "b\n\nc\n\nDo it.\n\nx\n\n"


def test_plain_text():
    assert read({"text": "低秩 {{ 7 * 7 }}", "label": 1}) == Text("低秩 {{ 7 * 7 }}")


def test_lists_that_a_table_holds_as_json():
    document = read({"messages": json.dumps([ASKED, SAID]), "tools": '[{"name": "f"}]'})
    assert document == Conversation((ASKED, SAID), tools=({"name": "f"},))


def test_the_shape_is_decided_row_by_row_and_whole_shapes_come_before_half_ones():
    assert shape_of({"instruction": "i", "output": "o", "text": "t"}) == "instruction"
    assert shape_of({"instruction": "i", "text": "t"}) == "text"
    assert shape_of({"messages": [], "text": "t"}) == "messages"
    assert shape_of({"messages": None, "text": "t"}) == "text"
    assert shape_of({"prompt": "p"}) is None


def test_turns_can_be_marked_as_context():
    document = read({"messages": [ASKED, SAID | {"weight": 0}, ASKED, SAID | {"weight": 1}, SAID | {"weight": None}]})
    assert document.trained == [3, 4]
    assert all("weight" not in turn for turn in document.messages)
    assert "turn 1: 'weight' is 0.5, expected 0 or 1" in failure({"messages": [ASKED, SAID | {"weight": 0.5}]})


def test_a_conversation_without_an_answer_is_read_and_has_nothing_to_train():
    assert read({"messages": [ASKED]}).trained == []


# Mistakes


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mesages": [], "id": 1}, "no known shape of row (fields: 'mesages', 'id'); did you mean 'messages'?"),
        ({}, "no known shape of row (fields: none)"),
        ({"prompt": "p", "completions": "c"}, "has 'prompt' but no 'completion' (fields: 'prompt', 'completions')"),
        ({"prompt": "p", "completions": "c"}, "did you mean 'completions'?"),
        ({"output": "o", "input": "i"}, "has 'output' but no 'instruction'"),
        ({"text": None}, "field 'text' is null"),
        ({"prompt": "p", "completion": None}, "field 'completion' is null"),
        ({"text": 5}, "text is a number (5), expected a string"),
        ({"text": ["a"]}, 'text is a list (["a"]), expected a string'),
        ({"text": " \n"}, "text is empty"),
        ({"text": "a\0b"}, "text holds a NUL (\\u0000) at character 2"),
        ({"text": "ab\ud83d"}, "text holds half of a surrogate pair (\\ud83d) at character 3"),
        ({"prompt": True, "completion": "c"}, "prompt.content is true or false (true), expected a string"),
        ({"prompt": "p", "completion": ""}, "completion is an empty assistant turn"),
        ({"instruction": "i", "output": " "}, "output is an empty assistant turn"),
        ({"instruction": 3, "output": "o"}, "instruction is a number (3), expected a string"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "history[0] is a list"),
        ({"messages": "hello"}, 'messages is the string ("hello"), expected a list'),
        ({"messages": '[{"role": '}, "messages begins like a list in JSON but is none"),
        ({"messages": {"role": "user"}}, "messages is an object"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": ["hi"]}, "messages[0] is the string (\"hi\"), expected an object with 'role' and 'content'"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing, expected one of system, developer, user"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role is a number (3)"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0] has no 'content', expected a string; did you"),
        ({"messages": [ASKED, {"role": "assistant", "content": "\n"}]}, "messages[1] is an empty assistant turn"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            'messages[0].content[0] is an object ({"type',
        ),
        ({"messages": [{"role": "user", "content": [{"text": 5}]}]}, "messages[0].content[0].text is a number (5)"),
        ({"conversations": [{"from": "humn", "value": "x"}]}, "did you mean 'human'?"),
        ({"conversations": [{"from": "human", "text": "x"}]}, "conversations[0] has no 'value'"),
        ({"messages": [ASKED, SAID], "tools": "none"}, 'tools is the string ("none"), expected a list'),
    ],
)
def test_a_mistake_is_told_with_line_field_and_what_was_expected(fields, said):
    text = failure(fields)
    assert "x.jsonl:7: " in text
    assert said in text


def test_every_mistake_of_a_row_is_told():
    text = failure({"messages": [{"role": "usr", "content": 3}, {"role": "assistant", "content": ""}], "tools": 4})
    for piece in ("messages[0].role", "messages[0].content", "messages[1] is an empty", "tools is a number"):
        assert piece in text


def test_an_unknown_shape_lists_the_known_ones():
    text = failure({"question": "q", "answer": "a"})
    for shape in SHAPES.values():
        assert all(repr(field) in text for field in shape.needed)


def test_a_long_value_is_cut_in_the_message():
    assert len(failure({"text": ["word " * 10_000]})) < 300


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "type", "weight"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)
names = st.sampled_from([field for shape in SHAPES.values() for field in shape.fields] + ["other"])


@given(fields=st.dictionaries(names, values, max_size=4))
def test_whatever_is_in_a_row_it_is_read_or_refused_in_words(fields):
    problems = Problems()
    document = read_document(Row(Origin("x.jsonl", 1), fields), problems)
    assert (document is None) == bool(len(problems))
    if isinstance(document, Conversation):
        assert all(isinstance(turn["role"], str) for turn in document.messages)
        assert all(isinstance(turn.get("content", ""), str) for turn in document.messages)
        assert all(document.messages[i]["role"] == "assistant" for i in document.trained)
