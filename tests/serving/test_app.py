"""Over HTTP, with OpenAI's own client, against what PEFT answers with each adapter alone."""

import asyncio
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.jobs.world import write_adapter, write_model
from tests.serving.conftest import SPECS
from tests.serving.server import running

HELLO = [{"role": "user", "content": "hello there"}]


def asked(server, model, text, length=10, *, stream=False, **more):
    """Text and reason; streamed, put together again."""
    chat = server.openai().chat.completions
    given = {"messages": [{"role": "user", "content": text}], "max_tokens": length, "temperature": 0, **more}
    if not stream:
        found = chat.create(model=model, **given)
        return found.choices[0].message.content, found.choices[0].finish_reason
    chunks = [chunk.choices[0] for chunk in chat.create(model=model, stream=True, **given)]
    return "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason


# ── right answers ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_adapter_in_any_mixture_answers_as_in_peft_alone(server, shelf, reference):
    folders = {"base": None, "model": None, **{name: shelf / "adapters" / name for name in SPECS}}
    questions = ["hello there", "what is 3 and 3?", "你好，世界"]
    jobs = [(name, text, stream) for name in folders for text in questions for stream in (False, True)]
    want = {
        (name, text): reference.text(folder, reference.chat(text), 10)
        for name, folder in folders.items()
        for text in questions
    }
    assert len(set(want.values())) == len(questions) * (len(SPECS) + 1)
    random.Random(0).shuffle(jobs)
    with ThreadPoolExecutor(8) as clients:
        got = list(clients.map(lambda job: asked(server, job[0], job[1], stream=job[2])[0], jobs))
    assert got == [want[name, text] for name, text, _ in jobs]
    assert server.metric("rankwise_adapter_evictions_total") > 0


def test_completions_of_texts_and_of_tokens(server, shelf, reference):
    texts = ["The quick brown", "def answer("]
    ids = [reference.tokenizer.encode(text) for text in texts]
    want = [reference.text(shelf / "adapters" / "a", one, 8) for one in ids]
    ask = server.openai().completions.create
    for prompt in (texts, ids):
        found = ask(model="a", prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.text for choice in found.choices] == want
        assert [choice.index for choice in found.choices] == [0, 1]
        assert found.usage.prompt_tokens == sum(map(len, ids))
    assert ask(model="a", prompt=ids[1], max_tokens=8, temperature=0).choices[0].text == want[1]
    streamed = ["", ""]
    for chunk in ask(model="base:a", prompt=texts, max_tokens=8, temperature=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == want


def seam(reference, folder, text):
    """An answer, and two characters of it of which two tokens have one each."""
    tokens = reference.tokens(folder, reference.chat(text), 24)
    whole = reference.tokenizer.decode(tokens)
    heads = [reference.tokenizer.decode(tokens[:i]) for i in range(2, len(tokens))]
    found = (whole[len(head) - 1 : len(head) + 1] for head in heads if whole.startswith(head))
    return whole, next((pair for pair in found if "\ufffd" not in pair and "<" not in pair), None)


def test_a_stop_string_ends_the_answer_and_is_never_sent(server, shelf, reference):
    tried = [(name, f"what is {n}?") for name in ("a", "b", "dora") for n in range(8)]
    answers = ((name, text, *seam(reference, shelf / "adapters" / name, text)) for name, text in tried)
    name, text, whole, stop = next(one for one in answers if one[3] is not None)
    for stream in (False, True):
        got = asked(server, name, text, 24, stream=stream, stop=["never said", stop])
        assert got == (whole[: whole.index(stop)], "stop")
    deadline = time.monotonic() + 10
    while server.metric("rankwise_engine_running") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.metric("rankwise_engine_running") == 0


def test_usage_and_lengths(server, reference):
    chat = server.openai().chat.completions
    whole = chat.create(model="a", messages=HELLO, max_completion_tokens=5, temperature=0)
    assert whole.usage.prompt_tokens == len(reference.chat("hello there"))
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (5, "length")
    told = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = chat.create(model="a", messages=HELLO, max_tokens=5, temperature=0, **told)
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)


def test_log_probabilities_are_the_models_own(server, shelf, reference):
    prompt, folder = reference.chat("hello there"), shelf / "adapters" / "b"
    tokens = reference.tokens(folder, prompt, 6)
    want = reference.logprobs(folder, prompt + tokens)[len(prompt) - 1 :]
    chat = server.openai().chat.completions
    for stream in (False, True):
        given = {"model": "b", "messages": HELLO, "max_tokens": 6, "temperature": 0, "stream": stream}
        found = chat.create(**given, logprobs=True, top_logprobs=3)
        parts = [chunk.choices[0].logprobs for chunk in found] if stream else [found.choices[0].logprobs]
        content = [entry for part in parts if part is not None for entry in part.content]
        assert len(content) == 6
        for place, entry in enumerate(content):
            best = want[place].topk(3)
            assert entry.logprob == pytest.approx(float(want[place, tokens[place]]), abs=1e-4)
            assert [one.logprob for one in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        said = bytes(byte for entry in content for byte in entry.bytes).decode(errors="replace")
        assert said == reference.tokenizer.decode(tokens)
    plain = server.openai().completions.create(model="b", prompt=prompt, max_tokens=6, temperature=0, logprobs=2)
    told = plain.choices[0].logprobs
    assert told.token_logprobs == pytest.approx([float(want[i, token]) for i, token in enumerate(tokens)], abs=1e-4)
    assert told.text_offset == sorted(told.text_offset)
    assert max(map(len, told.top_logprobs)) == 2


def test_chance_has_a_seed_and_choices_differ(server):
    chat = server.openai().chat.completions

    def drawn(**more):
        found = chat.create(model="a", messages=HELLO, max_tokens=8, temperature=2, **more)
        return [choice.message.content for choice in found.choices]

    assert drawn(seed=7, n=3) == drawn(seed=7, n=3)
    assert len(set(drawn(seed=7, n=3))) == 3
    assert drawn(seed=7) == drawn(seed=7, n=3)[:1]
    assert drawn(seed=7, extra_body={"top_k": 1}) == drawn(seed=8, top_p=1e-6)
    assert drawn(seed=-1) == drawn(seed=-1)


def test_models_are_listed_with_their_parent(server, shelf):
    client = server.openai()
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["model", *SPECS]
    assert (listed["a"].parent, listed["model"].parent) == ("model", None)
    assert listed["a"].root == str(shelf / "adapters" / "a")
    assert client.models.retrieve("base:ab").parent == "model"


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────

WRONG = [
    ({"model": "aa"}, 404, "no model 'aa'"),
    ({"model": "base:"}, 404, "no model"),
    ({"model": "a "}, 404, "did you mean 'a'"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "boss", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    ({"temperature": -1, "top_p": 2, "n": 0}, 400, "3 problems"),
    ({"temperature": "hot"}, 400, "temperature = 'hot'"),
    ({"max_tokens": 0}, 400, "max_tokens = 0"),
    ({"max_tokens": 1_000_000_000}, 400, "4096 are allowed"),
    ({"max_tokens": 4000}, 400, "more than the model's 256"),
    ({"max_token": 3}, 400, "did you mean 'max_tokens'"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"stop": ""}, 400, "empty string"),
    ({"stop": ["x"] * 17}, 400, "16 are allowed"),
    ({"stream_options": {"include_usage": True}}, 400, "stream is not true"),
    ({"top_logprobs": 2}, 400, "logprobs is not true"),
    ({"n": 65}, 400, "n = 65"),
    ({"messages": [{"role": "user", "content": "word " * 400}]}, 400, "more than the model's 256"),
]


@pytest.mark.parametrize(("change", "status", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_a_mistake_is_told_in_openais_shape(server, change, status, said):
    found = server.post("/v1/chat/completions", {"model": "a", "messages": HELLO, "max_tokens": 2, **change})
    assert found.status_code == status
    error = found.json()["error"]
    assert said in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_openais_client_knows_the_errors(server):
    chat = server.openai().chat.completions
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
        chat.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="top_p"):
        chat.create(model="a", messages=HELLO, top_p=7)


def test_neutral_values_are_no_mistake(server):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "tools": [], "n": 1}
    neutral |= {"response_format": {"type": "text"}, "stop": None, "metadata": {"x": "y"}, "logprobs": False}
    assert server.post("/v1/chat/completions", {"model": "a", "messages": HELLO, "max_tokens": 1, **neutral}).json()[
        "usage"
    ]


def test_bodies_that_are_none(server):
    sent = {"headers": {"Content-Type": "application/json"}, "timeout": 60}
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(url, content=b"{", **sent).status_code == 400
    assert httpx.post(url, content=b"[]", **sent).status_code == 400
    assert httpx.post(url, content=b"[" * 100_000, **sent).status_code == 400
    assert httpx.post(url, content=b'{"model": "\xff"}', **sent).status_code == 400
    assert httpx.post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert httpx.post(url, content=b" " * (5 << 20), **sent).status_code == 413
    parts = (b" " * (1 << 20) for _ in range(5))  # without a length
    assert httpx.post(url, content=parts, **sent).status_code == 413
    assert server.get("/v1/nothing").json()["error"]["code"] == "no_route"
    assert server.get("/v1/completions").status_code == 405
    assert server.get("/health").json() == {"status": "ok"}


def test_a_page_that_calls_itself_by_this_machine_is_kept_out(server):
    assert server.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert server.get("/v1/models", headers={"Host": "LOCALHOST:1"}).status_code == 200


def test_a_server_whose_engine_has_died_says_so(shelf):
    with running(shelf / "model") as server:
        server.service.engine.stop()
        assert (server.get("/health").status_code, server.get("/health").json()) == (503, {"status": "dead"})


def test_a_full_queue_says_when_to_come_again(shelf):
    with running(shelf / "model", max_waiting=2) as server:
        body = {"model": "base", "messages": HELLO, "max_tokens": 2, "n": 3}
        found = server.post("/v1/chat/completions", body)
        assert (found.status_code, found.headers["retry-after"]) == (429, "1")
        assert found.json()["error"]["type"] == "rate_limit_error"
        assert asked(server, "base", "hello", 2)[1] == "length"


# ── who may ask ──────────────────────────────────────────────────────────────────────────────────────────────────────

_POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_GOT = ("/v1/models", "/v1/models/base", "/metrics", "/docs", "/openapi.json", "/nothing")
ROUTES = [*(("POST", path) for path in _POSTED), *(("GET", path) for path in _GOT)]


def test_a_key_is_asked_for_on_every_route(shelf):
    with running(shelf / "model", api_key="s3cret") as server:
        for method, path in ROUTES:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
                found = httpx.request(method, f"{server.url}{path}", headers=headers, timeout=60)
                assert (path, found.status_code) == (path, 401)
                assert found.headers["www-authenticate"] == "Bearer"
        assert server.get("/health").status_code == 200
        assert asked(server, "base", "hello", 2)[1] == "length"
        other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0)
        with other, pytest.raises(openai.AuthenticationError):
            other.models.list()


# ── adapters that come and go ────────────────────────────────────────────────────────────────────────────────────────


def test_adapters_are_loaded_and_unloaded_as_in_vllm(shelf, reference, tmp_path):
    write_adapter(tmp_path / "new", shelf / "model", size=0.45)
    want = reference.text(tmp_path / "new", reference.chat("hello"), 8)
    with running(shelf / "model", adapters_dir=tmp_path, max_loaded=1) as server:
        assert server.told["adapters"] == ["new"]
        assert asked(server, "new", "hello", 8)[0] == want
        load = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "new"})
        assert (load.status_code, load.text) == (200, "Success: LoRA adapter 'x' added successfully.")
        assert asked(server, "x", "hello", 8)[0] == want
        again = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(tmp_path / "new")})
        assert (again.status_code, "served already" in again.text) == (400, True)
        gone = server.post("/v1/unload_lora_adapter", {"lora_name": "x"})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'x' removed successfully.")
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "x"}).status_code == 404
        assert [model.id for model in server.openai().models.list()] == ["model", "new"]
        for path in ("..", "../x", str(shelf / "adapters" / "a"), "/etc", "a\0b"):
            found = server.post("/v1/load_lora_adapter", {"lora_name": "y", "lora_path": path})
            assert found.status_code == 400
        for name in ("../x", "base", "model", "a:b", ""):
            found = server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "new"})
            assert found.status_code == 400


def test_other_weights_under_the_same_name_are_answered_from_at_once(shelf, reference, tmp_path):
    """And nothing that was computed with the old ones is taken for theirs, however alike the prompts."""
    question = "a long question, so that some blocks of the prompt are full and could be found again: what is it?"
    one, two = (write_adapter(tmp_path / name, shelf / "model", size=size) for name, size in (("1", 0.3), ("2", 0.6)))
    want = [reference.text(folder, reference.chat(question), 8) for folder in (one, two)]
    assert want[0] != want[1]
    with running(shelf / "model", adapters_dir=tmp_path) as server:
        for folder, text in ((one, want[0]), (two, want[1]), (one, want[0])):
            body = {"lora_name": "x", "lora_path": str(folder), "load_inplace": True}
            assert server.post("/v1/load_lora_adapter", body).status_code == 200
            assert [asked(server, "x", question, 8)[0] for _ in range(2)] == [text] * 2
        assert server.metric("rankwise_engine_prefix_hit_tokens_total") > 0


def spoilt(folder, shelf, how):
    write_adapter(folder, shelf / "model")
    weights = folder / "adapter_model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "not finite":
        tensors = load_file(weights)
        next(iter(tensors.values()))[0, 0] = torch.nan
        save_file(tensors, weights)
    elif how == "shape":
        tensors = {name: torch.zeros(tensor.shape[0], 7) for name, tensor in load_file(weights).items()}
        save_file(tensors, weights)
    elif how == "config":
        (folder / "adapter_config.json").write_text("{")
    elif how == "base":
        write_adapter(folder / "other", write_model(folder / "base", tie_word_embeddings=True))
        return folder / "other"
    elif how == "template":
        record = json.loads((folder / "rankwise.json").read_text())
        (folder / "rankwise.json").write_text(json.dumps(record | {"template": {"digest": "0" * 64}}))
    elif how == "task":
        record = json.loads((folder / "rankwise.json").read_text())
        (folder / "rankwise.json").write_text(json.dumps(record | {"task": "masked-lm"}))
    return folder


def test_bad_adapters_are_refused_while_streams_run_on_unharmed(shelf, reference, tmp_path):
    want = reference.text(shelf / "adapters" / "a", reference.chat("hello there"), 60)
    ways = ("cut", "not finite", "shape", "config", "base", "template", "task")
    folders = {how: spoilt(tmp_path / how.replace(" ", "-"), shelf, how) for how in ways}
    with running(shelf / "model", adapters={"a": shelf / "adapters" / "a"}, adapters_dir=tmp_path) as server:
        with ThreadPoolExecutor(6) as clients:
            streams = [clients.submit(asked, server, "a", "hello there", 60, stream=True) for _ in range(6)]
            for how, folder in folders.items():
                found = server.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": str(folder)})
                assert (how, found.status_code) == (how, 400)
                assert found.json()["error"]["code"].startswith("adapter_")
            missing = server.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": "nowhere"})
            assert missing.status_code == 400
            assert [stream.result()[0] for stream in streams] == [want] * 6
        offered = server.post("/v1/completions", {"model": "cut", "prompt": "x"})
        assert (offered.status_code, "not a whole safetensors file" in offered.text) == (400, True)
        assert asked(server, "a", "hello there", 60)[0] == want


def test_who_leaves_is_computed_for_no_longer(shelf):
    with running(shelf / "model", adapters={"a": shelf / "adapters" / "a"}) as server:
        body = {"model": "a", "messages": HELLO, "max_tokens": 200, "ignore_eos": True, "n": 8}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}) as stream:
            next(stream.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.05)
        deadline = time.monotonic() + 20
        while server.metric("rankwise_engine_running") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.metric("rankwise_engine_running") == 0
        assert server.metric("rankwise_disconnects_total") == 2
        assert server.metric("rankwise_engine_generated_tokens_total") < 2 * 8 * 200


def test_a_merged_adapter_is_served_alone(shelf, reference):
    named = {"a": shelf / "adapters" / "a"}
    with running(shelf / "model", adapters=named, merge="a", adapters_dir=None) as server:
        want = reference.text(named["a"], reference.chat("hello there"), 10)
        assert asked(server, "a", "hello there") == (want, "length")
        assert [model.id for model in server.openai().models.list()] == ["a"]
        assert server.post("/v1/completions", {"model": "base", "prompt": "x"}).status_code == 404
        found = server.post("/v1/unload_lora_adapter", {"lora_name": "a"})
        assert (found.status_code, "merged" in found.text) == (400, True)


def test_a_model_without_a_chat_template_completes(tmp_path):
    with running(write_model(tmp_path / "plain", template=None)) as server:
        found = server.post("/v1/chat/completions", {"model": "base", "messages": HELLO})
        assert (found.status_code, "no chat template" in found.text) == (400, True)
        assert server.post("/v1/completions", {"model": "base", "prompt": "hello"}).status_code == 200


def test_requests_that_wait_for_one_cold_adapter_wait_for_one_loading(shelf):
    named = {"a": shelf / "adapters" / "a"}
    with running(shelf / "model", adapters=named) as server:

        async def all_at_once():
            async with httpx.AsyncClient(timeout=60) as client:
                body = {"model": "a", "prompt": "hello", "max_tokens": 2}
                posts = (client.post(f"{server.url}/v1/completions", json=body) for _ in range(12))
                return await asyncio.gather(*posts)

        assert {found.status_code for found in asyncio.run(all_at_once())} == {200}
        assert server.metric("rankwise_adapter_loads_total") == 1
        assert threading.active_count() < 40


def test_rows_of_tokens_and_modules_trained_whole_are_served_beside_others(shelf, reference, tmp_path):
    write_adapter(tmp_path / "rows", shelf / "model", targets=("q_proj",), trained_tokens=(20, 40, 41), size=0.4)
    whole = {"targets": ("q_proj",), "modules_to_save": ("up_proj",), "size": 0.4}
    write_adapter(tmp_path / "whole", shelf / "model", **whole)
    write_adapter(tmp_path / "plain", shelf / "model", targets=("q_proj", "v_proj"), size=0.5)
    jobs = [(name, f"what is {n}?") for n in range(4) for name in ("rows", "whole", "plain", "base")]
    folders = {name: tmp_path / name for name in ("rows", "whole", "plain")} | {"base": None}
    want = [reference.text(folders[name], reference.chat(text), 8) for name, text in jobs]
    with running(shelf / "model", adapters_dir=tmp_path) as server, ThreadPoolExecutor(8) as clients:
        assert list(clients.map(lambda job: asked(server, *job, 8)[0], jobs)) == want
