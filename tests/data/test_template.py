import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.data.conversations import Conversation, Text
from rankwise.data.template import Template, TemplateRefusedError
from rankwise.errors import DataError
from tests.data.chat import NEEDS_USER_FIRST, NO_SYSTEM, PROMPTED, SPECIAL, TEMPLATES, byte_level, metaspace, words

HELLO = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "hello world"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "good day"},
]


def chat(*messages, **changes):
    return Conversation(tuple(messages), **changes)


def trained(template, document):
    """The trained stretches of a document, as text."""
    return [text for text, mask in template.marked(document.tokens, document.supervised) if mask]


def whole(template, document):
    return "".join(text for text, _ in template.marked(document.tokens, document.supervised))


def added(tokenizer, messages, i):
    """What turn i adds to the prompt for it: said by the template itself, without our code."""
    prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
    assert text.startswith(prompt)
    return text[len(prompt) :]


pieces = st.sampled_from(
    [
        "hello",
        " world",
        "\n",
        "\n\n",
        "  ",
        "你好",
        "世界。",
        "🤖",
        "é",
        "{{ 7 * 7 }}",
        "{% if x %}",
        "the answer",
        ".",
        "'s",
        "1234",
        "\t",
    ]
)
said = st.lists(pieces, min_size=1, max_size=6).map("".join).filter(str.strip)


@st.composite
def conversations(draw, name="chatml"):
    turns = []
    if name not in NO_SYSTEM and draw(st.booleans()):
        turns.append({"role": "system", "content": draw(said)})
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(said)}, {"role": "assistant", "content": draw(said)}]
    if draw(st.booleans()):
        turns.append({"role": "user", "content": draw(said)})
    return turns


@pytest.mark.parametrize("name", PROMPTED)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_answer_is_trained_after_exactly_the_tokens_with_which_it_will_be_asked_for(name, data):
    tokenizer = byte_level(TEMPLATES[name])
    template = Template(tokenizer)
    messages = data.draw(conversations(name))
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    met = []
    for document in template.render(chat(*messages)):
        assert not document.supervised[0]
        assert document.supervised[-1]
        rises = np.flatnonzero(np.diff(document.supervised.astype(int)) == 1) + 1
        prompts = {i: template.generation_prompt(messages[:i]) for i in answers}
        for begin in rises:
            asked = document.tokens[:begin].tolist()
            met += [i for i, prompt in prompts.items() if prompt == asked]
    assert sorted(met) == answers  # each once, and no stretch without a prompt that leads to it


@pytest.mark.parametrize("name", PROMPTED)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_is_trained_is_what_the_template_adds(name, data):
    tokenizer = byte_level(TEMPLATES[name])
    template = Template(tokenizer)
    messages = data.draw(conversations(name))
    expected = [
        added(tokenizer, messages, i).rstrip() for i, turn in enumerate(messages) if turn["role"] == "assistant"
    ]
    found = [text for document in template.render(chat(*messages)) for text in trained(template, document)]
    closed = [text.removesuffix("</s>") for text in found] if name == "bare" else found
    if name == "phi3":  # its last token ends the conversation, not the turn
        closed, expected = ([text.removesuffix("\n<|endoftext|>") for text in each] for each in (closed, expected))
    assert closed == expected


@pytest.mark.parametrize("kind", [byte_level, metaspace, words])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_turn_is_trained_and_the_white_space_behind_it_is_not(name, kind):
    template = Template(kind(TEMPLATES[name]))
    documents = template.render(chat(*HELLO))
    assert documents
    for document in documents:
        assert document.tokens[-1] in {*template.stops, template.tokeniser.ids("<|endoftext|>")[-1]}
        assert document.supervised[-1]
        assert document.tokens.dtype == np.int32
        assert document.supervised.dtype == np.bool_
    stretches = [text for document in documents for text in trained(template, document)]
    assert len(stretches) == 2
    assert all(text == text.rstrip() for text in stretches)


@pytest.mark.parametrize("kind", [byte_level, metaspace])
@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "r1"])
def test_there_is_one_bos_where_the_template_writes_it_and_the_tokenizer_too(name, kind):
    template = Template(kind(TEMPLATES[name], bos=True))
    for document in template.render(chat(*HELLO)):
        assert document.tokens.tolist().count(1) == 1
        assert document.tokens[0] == 1
    assert template.generation_prompt(HELLO[:1]).count(1) == 1


def test_the_template_alone_decides_about_bos_in_a_chat_and_the_tokenizer_in_a_text():
    template = Template(byte_level(TEMPLATES["generation tags"], bos=True))
    (document,) = template.render(chat(*HELLO))
    assert 1 not in document.tokens
    (document,) = template.render(Text("hello"))
    assert document.tokens[0] == 1


@pytest.mark.parametrize("pad", ["</s>", "<|im_end|>", "<unk>"])
def test_padding_has_no_say_in_the_mask(pad):
    one, other = Template(byte_level(TEMPLATES["chatml"], pad=pad)), Template(byte_level(TEMPLATES["chatml"]))
    (a,), (b,) = one.render(chat(*HELLO)), other.render(chat(*HELLO))
    assert np.array_equal(a.tokens, b.tokens)
    assert np.array_equal(a.supervised, b.supervised)
    assert one.digest == other.digest
    assert trained(one, a) == ["hello world<|im_end|>", "good day<|im_end|>"]


def test_eos_that_is_the_end_of_turn_token_and_the_pad_token_is_trained():
    """SmolLM2 and Qwen: pad == eos == <|im_end|>.  Masking by id would unlearn stopping."""
    template = Template(byte_level(TEMPLATES["chatml"], pad="<|im_end|>", eos="<|im_end|>"))
    (document,) = template.render(chat(*HELLO))
    end = template.tokeniser.eos
    assert template.stops == (end,)
    assert document.supervised[document.tokens == end].tolist() == [False, False, True, False, True]  # system, user, …


def test_only_the_last_turn_when_asked():
    template = Template(byte_level(TEMPLATES["chatml"]), train_on="last")
    (document,) = template.render(chat(*HELLO))
    assert trained(template, document) == ["good day<|im_end|>"]
    assert "hello world" in whole(template, document)


def test_turns_marked_as_context_are_not_trained():
    template = Template(byte_level(TEMPLATES["chatml"]))
    (document,) = template.render(chat(*HELLO, untrained=frozenset({3})))
    assert trained(template, document) == ["hello world<|im_end|>"]
    assert "how are you" not in whole(template, document)  # what follows the last trained token teaches nothing
    assert template.render(chat(*HELLO, untrained=frozenset({1, 3}))) == []
    assert template.render(chat(HELLO[0])) == []


def test_thinking_is_trained_where_it_was_written_and_gone_from_history():
    template = Template(byte_level(TEMPLATES["qwen3"]))
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"}
    first, second = template.render(chat(HELLO[0], thought, *HELLO[2:]))
    assert trained(template, first) == ["<think>\nhm\n</think>\n\nhello<|im_end|>"]
    assert trained(template, second) == ["<think>\n\n</think>\n\ngood day<|im_end|>"]
    assert "hm" not in whole(template, second)


def test_a_conversation_whose_history_stays_is_one_document():
    for name in set(TEMPLATES) - {"qwen3"}:
        assert len(Template(byte_level(TEMPLATES[name])).render(chat(*HELLO))) == 1, name


def test_a_second_token_at_the_very_end_does_not_split_a_conversation():
    template = Template(byte_level(TEMPLATES["phi3"]))
    (document,) = template.render(chat(*HELLO))
    assert trained(template, document) == ["hello world<|end|>", "good day<|end|>\n<|endoftext|>"]


def test_a_prompt_that_answers_do_not_keep_is_not_trained():
    template = Template(byte_level(TEMPLATES["r1"]))
    (document,) = template.render(chat(*HELLO))
    assert trained(template, document) == ["hello world<|endoftext|>", "good day<|endoftext|>"]
    assert "<think>" not in whole(template, document)


def test_an_answer_that_begins_like_the_unkept_prompt_is_trained_whole():
    template = Template(byte_level(TEMPLATES["r1"]))
    (document,) = template.render(chat(HELLO[0], {"role": "assistant", "content": "<think is a word"}))
    assert trained(template, document) == ["<think is a word<|endoftext|>"]


def test_an_opening_answer_is_trained_but_not_the_system_prompt_the_template_adds():
    template = Template(byte_level(TEMPLATES["chatml"]))
    (document,) = template.render(chat({"role": "assistant", "content": "Xhello"}))
    assert trained(template, document) == ["Xhello<|im_end|>"]
    (document,) = template.render(
        chat({"role": "assistant", "content": "Yhello"}, {"role": "assistant", "content": "X"})
    )
    assert trained(template, document) == ["Yhello<|im_end|>", "X<|im_end|>"]


def test_a_template_without_an_end_of_turn_token_gets_eos_behind_the_last_answer():
    template = Template(byte_level(TEMPLATES["bare"]))
    (document,) = template.render(chat(*HELLO, {"role": "user", "content": "and?"}))
    assert trained(template, document) == ["hello world", "good day</s>"]
    assert document.tokens[-1] == template.tokeniser.eos


def test_an_answer_that_ends_in_a_special_token_is_still_closed():
    template = Template(byte_level(TEMPLATES["bare"]))
    (document,) = template.render(chat(HELLO[0], {"role": "assistant", "content": "hello <|end|>"}))
    assert trained(template, document) == ["hello <|end|></s>"]


def test_a_template_that_closes_with_nothing_needs_an_eos():
    template = Template(byte_level(TEMPLATES["bare"], eos=None))
    with pytest.raises(DataError, match="no end-of-sequence token"):
        template.render(chat(*HELLO))
    with pytest.raises(DataError, match="never learn to stop"):
        Template(byte_level(None, eos=None))


@pytest.mark.parametrize(
    "text", ["{{ 7 * 7 }}", "{% for x in y %}", "{# gone #}", "{{ messages }}", "{{ ''.__class__ }}"]
)
def test_a_row_is_never_run_as_a_template(text):
    template = Template(byte_level(TEMPLATES["chatml"]))
    (document,) = template.render(chat({"role": "user", "content": text}, {"role": "assistant", "content": text}))
    assert trained(template, document) == [f"{text}<|im_end|>"]
    assert whole(template, document).count(text) == 2


def test_chinese_is_trained_character_for_character():
    template = Template(byte_level(TEMPLATES["chatml"]))
    (document,) = template.render(
        chat({"role": "user", "content": "天气怎么样？"}, {"role": "assistant", "content": "鑫淼，晴🌞。"})
    )
    assert trained(template, document) == ["鑫淼，晴🌞。<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "messages", "why"),
    [
        ("mistral", [HELLO[0], HELLO[0], HELLO[1]], "roles must alternate"),
        ("gemma", [{"role": "system", "content": "x"}, *HELLO], "System role not supported"),
        ("chatml", [HELLO[0], {"role": "assistant", "tool_calls": []}], "refuses"),
    ],
)
def test_what_a_template_refuses_is_said_in_its_words(name, messages, why):
    with pytest.raises(TemplateRefusedError, match=why):
        Template(byte_level(TEMPLATES[name])).render(chat(*messages))


def test_tools_and_extra_keys_reach_the_template():
    source = "{{ tools | tojson if tools }}{% for m in messages %}{{ m['name'] }}:{{ m['content'] }}<|end|>{% endfor %}"
    template = Template(byte_level(source))
    tools = ({"type": "function", "function": {"name": "f"}},)
    (document,) = template.render(
        chat(
            {"role": "user", "name": "ann", "content": "hi"},
            {"role": "assistant", "name": "bob", "content": "ho"},
            tools=tools,
        )
    )
    assert whole(template, document) == json.dumps(tools).replace("(", "[") + "ann:hi<|end|>bob:ho<|end|>"
    assert trained(template, document) == ["bob:ho<|end|>"]


def test_an_unknown_way_to_train_is_refused():
    with pytest.raises(DataError, match="expected one of all, last"):
        Template(byte_level(TEMPLATES["chatml"]), train_on="first")


# Tokenizers without a chat template: the plain format


@pytest.mark.parametrize(("bos", "begin"), [(True, "<s>"), (False, "")])
def test_prompt_and_completion_without_a_template(bos, begin):
    template = Template(byte_level(bos=bos))
    row = chat({"role": "user", "content": "ignored"}, {"role": "assistant", "content": "chat"}, prompt="cat ")
    (document,) = template.render(row)
    assert whole(template, document) == f"{begin}cat chat</s>"
    assert trained(template, document) == ["chat</s>"]
    assert document.tokens[:-1].tolist()[: len(document.tokens) - int(document.supervised.sum())] == (
        template.generation_prompt([{"role": "user", "content": "cat "}])
    )


@settings(deadline=None, max_examples=60)
@given(prompt=said, answer=said, bos=st.booleans())
def test_without_a_template_the_prompt_keeps_its_tokens_whatever_follows(prompt, answer, bos):
    template = Template(byte_level(bos=bos))
    row = chat({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}, prompt=prompt)
    (document,) = template.render(row)
    begin = int(np.argmax(document.supervised))
    assert document.tokens[:begin].tolist() == template.generation_prompt([{"role": "user", "content": prompt}])
    assert trained(template, document) == [f"{answer}</s>"]


def test_turns_without_a_template_are_refused_with_a_way_out():
    with pytest.raises(TemplateRefusedError, match="instruct model"):
        Template(byte_level()).render(chat(*HELLO))
    with pytest.raises(TemplateRefusedError, match="only one turn"):
        Template(byte_level()).generation_prompt(HELLO[:3])


@pytest.mark.parametrize("kind", [byte_level, metaspace, words])
def test_a_text_is_trained_but_for_its_first_token(kind):
    template = Template(kind())
    (document,) = template.render(Text("hello world, how are you"))
    assert document.supervised.tolist() == [False] + [True] * (len(document.tokens) - 1)
    assert document.tokens[-1] == template.tokeniser.eos


def test_what_a_text_brings_along_is_not_written_twice():
    template = Template(byte_level(bos=True))
    (document,) = template.render(Text("<s>hello</s>"))
    assert whole(template, document) == "<s>hello</s>"


# The digest


def test_the_digest_changes_with_all_that_changes_the_tokens_and_nothing_else():
    base = Template(byte_level(TEMPLATES["chatml"])).digest
    assert Template(byte_level(TEMPLATES["chatml"])).digest == base
    others = [
        byte_level(TEMPLATES["chatml"] + " "),
        byte_level(TEMPLATES["chatml"], bos=True),
        byte_level(TEMPLATES["chatml"], eos="<|im_end|>"),
        metaspace(TEMPLATES["chatml"]),
        byte_level(),
    ]
    digests = [Template(tokenizer).digest for tokenizer in others]
    assert len({base, *digests}) == len(others) + 1


def test_a_call_that_pads_or_truncates_does_not_change_the_digest_or_the_tokens():
    tokenizer = byte_level(TEMPLATES["chatml"])
    before = Template(tokenizer)
    (document,) = before.render(chat(*HELLO))
    tokenizer(["hello", "hello there world"], padding="max_length", truncation=True, max_length=4)
    after = Template(tokenizer)
    assert after.digest == before.digest
    assert np.array_equal(after.render(chat(*HELLO))[0].tokens, document.tokens)


def test_a_tokenizer_that_cannot_place_its_tokens_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="fast tokenizer"):
        Template(Slow())


def test_special_tokens_of_the_tests_are_known():
    assert byte_level().convert_tokens_to_ids(SPECIAL) == list(range(len(SPECIAL)))


def test_user_first_templates_are_listed():
    for name in NEEDS_USER_FIRST:
        with pytest.raises(TemplateRefusedError):
            Template(byte_level(TEMPLATES[name])).render(chat(*HELLO[1:]))
