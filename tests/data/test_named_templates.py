import pytest

from rankwise.data.template import Template
from rankwise.errors import DataError
from tests.data.chat import TEMPLATES, byte_level

CHATML = TEMPLATES["chatml"]


def named(**templates):
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = templates
    return tokenizer


def test_named_templates_without_a_default_are_refused_with_a_way_out():
    with pytest.raises(DataError, match="'rag', 'tool_use'") as caught:
        Template(named(rag=CHATML, tool_use=CHATML))
    assert "tokenizer.chat_template" in caught.value.hint


def test_every_named_template_counts_for_the_digest():
    digests = {Template(named(default=CHATML, tool_use=CHATML + end)).digest for end in ("", " ")}
    alone = Template(byte_level(CHATML)).digest
    assert len({*digests, alone}) == 3
    assert Template(named(default=CHATML)).digest == alone


def test_every_named_template_is_tried():
    endless = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="refused"):
        Template(named(default=CHATML, tool_use=endless))
    with pytest.raises(DataError, match="broken"):
        Template(named(default=CHATML, tool_use="{% if %}"))


def test_an_answer_that_looks_like_the_end_of_a_token_still_ends_with_that_token():
    template = Template(byte_level(CHATML))
    (draft,) = template.drafts(_asked(">"))
    assert draft.pieces[-1].text == "><|im_end|>"
    assert draft.closed is False


def _asked(answer):
    from rankwise.data.conversations import Conversation

    return Conversation(({"role": "user", "content": "q"}, {"role": "assistant", "content": answer}))
