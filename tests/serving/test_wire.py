import json

import pytest

from rankwise.errors import AdapterFileError, ModelError, QueueFullError
from rankwise.serving.wire import AskedChat, AskedCompletion, RefusedError, read_body, refusal

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def chat(**change):
    return read_body(AskedChat, json.dumps(CHAT | change).encode())


def test_what_is_not_said_is_as_openai_has_it():
    asked = chat()
    sampling = asked.sampling(0)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, sampling.logprobs) == (
        *(1.0, 1.0, 0),
        *(None, None),
    )
    assert (asked.choices, asked.longest, asked.stops, asked.wants_usage) == (1, None, (), False)
    assert read_body(AskedCompletion, b'{"model": "m", "prompt": "x"}').longest == 16


def test_seeds_of_choices_are_their_own_and_never_negative():
    assert [chat(seed=5, n=2).sampling(i).seed for i in (0, 1)] == [5, 6]
    assert chat(seed=-1).sampling(0).seed >= 0
    assert chat(seed=(1 << 63) - 1).sampling(1).seed == 0
    with pytest.raises(RefusedError, match="seed"):
        chat(seed=1 << 63)


def test_content_in_parts_is_joined_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "developer", "content": parts}, {"role": "assistant", "content": None}])
    assert [turn.plain() for turn in asked.messages] == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": ""},
    ]


def test_all_problems_come_at_once():
    with pytest.raises(RefusedError) as caught:
        chat(temperature=9, top_p=0, bogus=1, messages=5)
    assert caught.value.status == 400
    for name in ("temperature", "top_p", "bogus", "messages"):
        assert name in caught.value.message


@pytest.mark.parametrize("prompt", ["x", ["x", "y"], [1, 2], [[1], [2, 3]]])
def test_the_four_kinds_of_prompt(prompt):
    asked = read_body(AskedCompletion, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert len(asked.prompts) == (2 if prompt in (["x", "y"], [[1], [2, 3]]) else 1)


@pytest.mark.parametrize("prompt", [[], ["x"] * 65, [True], [-1.5], None, [["x"]]])
def test_prompts_that_are_none(prompt):
    with pytest.raises(RefusedError):
        read_body(AskedCompletion, json.dumps({"model": "m", "prompt": prompt}).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(number):
    with pytest.raises(RefusedError, match="temperature"):
        read_body(AskedChat, json.dumps(CHAT)[:-1].encode() + f', "temperature": {number}}}'.encode())


def test_errors_have_a_status():
    assert refusal(AdapterFileError("broken")).body()["error"]["code"] == "adapter_file"
    assert (refusal(QueueFullError("full")).status, refusal(ModelError("odd")).status) == (429, 500)
    assert refusal(QueueFullError("full", hint="later")).body() == {
        "error": {"message": "full (later)", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
