"""A whole server: from the command line to SIGTERM, and with a thousand adapters."""

import json
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer

from rankwise.cli.served import folders
from rankwise.errors import SpecError
from rankwise.planning.process import most_resident_bytes
from rankwise.serving.service import ServeRequest
from tests.cli.test_verbs import environment
from tests.serving.canaries import write_canary, write_steady_model
from tests.serving.server import running

COMMAND = shutil.which("rankwise", path=Path(sys.executable).parent)


def test_a_thousand_adapters_and_never_a_wrong_answer(tmp_path):
    """Each says its own two tokens alone; eight are in memory; nothing piles up."""
    model = write_steady_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = [i for i in range(20, len(tokenizer)) if tokenizer.decode([i]).isalpha()]
    own = {f"canary-{i}": words[i % len(words)] for i in range(1000)}
    for name, word in own.items():
        write_canary(tmp_path / "adapters" / name, word, 32, len(tokenizer))
    asked = {"adapters_dir": tmp_path / "adapters", "max_loaded": 8, "patience": 60}
    with running(model, **asked) as server, httpx.Client(timeout=60) as client:
        chance = random.Random(0)

        def ask(name):
            body = {"model": name, "prompt": f"who? {chance.random()}", "max_tokens": 3, "temperature": 0}
            found = client.post(f"{server.url}/v1/completions", json=body)
            return found.status_code, found.json()["choices"][0]["text"] if found.status_code == 200 else found.text

        def round_of(count):
            names = [chance.choice(list(own)) for _ in range(count)]
            with ThreadPoolExecutor(8) as clients:
                assert list(clients.map(ask, names)) == [(200, tokenizer.decode([own[name]] * 3)) for name in names]

        round_of(100)
        before = most_resident_bytes()
        round_of(300)
        assert most_resident_bytes() - before < 30 << 20
        assert server.metric("rankwise_adapters") == 1000
        assert server.metric("rankwise_adapters_resident") <= 8
        assert server.metric("rankwise_adapter_evictions_total") > 300
        assert len(server.service.bank.names) <= 8


def test_sigterm_lets_answers_end_and_takes_no_more(shelf):
    line = [COMMAND, "serve", "--model", shelf / "model", "--adapter", f"a={shelf / 'adapters' / 'a'}", "--port", 0]
    line += ["--dtype", "float32", "--cache", "0.05", "--json"]
    server = subprocess.Popen(list(map(str, line)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        told = json.loads(server.stdout.readline())
        assert (told["adapters"], told["base"], told["key"]) == (["a"], "model", False)
        body = {"model": "a", "prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 8}
        url = f"{told['url']}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            statuses = {
                httpx.post(url, json=body | {"max_tokens": 1, "n": 1, "stream": False}).status_code for _ in "abc"
            }
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert ends.count("length") == 8
        assert 503 in statuses
        assert server.wait(30) == 0
        assert server.stderr.read() == b""
    finally:
        server.kill()
        server.communicate()


def test_people_are_told_what_is_served_and_how_to_ask(shelf):
    line = [COMMAND, "serve", "--model", shelf / "model", "--port", 0, "--dtype", "float32", "--cache", "0.05"]
    server = subprocess.Popen(list(map(str, line)), env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        shown = [server.stdout.readline() for _ in range(5)]
        assert shown[0].startswith("serving on http://127.0.0.1:")
        command = shown[3].partition("try")[2].strip()
        done = subprocess.run(
            ["sh", "-c", command.replace("curl ", "curl -s ")], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout)["object"] == "chat.completion"
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "127.evil.org"])
def test_others_may_only_ask_with_a_key(host):
    with pytest.raises(SpecError, match="no --api-key"):
        ServeRequest(model="m", host=host)
    assert ServeRequest(model="m", host=host, api_key="k").host == host


def test_requests_that_make_no_sense():
    for wrong in ({"api_key": " "}, {"api_key": "é"}, {"merge": "x"}, {"port": 70000}, {"max_loaded": 0}):
        with pytest.raises(SpecError):
            ServeRequest(model="m", **wrong)
    with pytest.raises(SpecError, match="served alone"):
        ServeRequest(model="m", adapters={"a": Path("a"), "b": Path("b")}, merge="a")


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(shelf):
    with running(shelf / "model") as server:
        port = server.service.port
        with pytest.raises(SpecError, match="cannot be taken"), running(shelf / "nothing", port=port):
            pass


def test_adapters_that_cannot_be_served_are_all_told_at_the_start(shelf, tmp_path):
    named = {"x": tmp_path / "x", "base": shelf / "adapters" / "a", "ok": shelf / "adapters" / "b"}
    with pytest.raises(SpecError, match=r"2 adapters") as caught, running(shelf / "model", adapters=named):
        pass
    assert "x: " in caught.value.message
    assert "what the base is called" in caught.value.message


def test_names_and_folders():
    assert folders(["a=runs/a", "b=x=y"]) == {"a": Path("runs/a"), "b": Path("x=y")}
    with pytest.raises(SpecError) as caught:
        folders(["a", "=b", "c=d", "c=e"])
    assert caught.value.message.count("is not NAME=DIR") == 2
    assert "twice" in caught.value.message
