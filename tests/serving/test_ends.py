"""What a server does at its edges: slow bodies, impatient ends, other addresses, bases in codes, and `force`."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from rankwise.errors import SpecError
from tests.cli.test_verbs import environment
from tests.jobs.world import write_adapter
from tests.serving.server import running

COMMAND = shutil.which("rankwise", path=Path(sys.executable).parent)
LONG = {"model": "base", "prompt": "hello", "max_tokens": 240, "ignore_eos": True}


@contextmanager
def process(shelf, *more):
    """`rankwise serve` by itself, on the base alone."""
    line = [COMMAND, "serve", "--model", shelf / "model", "--port", 0, "--dtype", "float32", "--cache", 0.2, "--json"]
    server = subprocess.Popen(
        [*map(str, line), *more], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield server, json.loads(server.stdout.readline())["url"]
    finally:
        server.kill()
        server.communicate()


def streamed(url, signals):
    """Lines of forty long answers, in the midst of which a server is sent signals; None at the end if it is cut off."""
    found = []
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True, "n": 40}, timeout=60) as stream:
        assert stream.status_code == 200
        try:
            for line in stream.iter_lines():
                if not found:
                    signals()
                found += [line] if line else []
        except httpx.RemoteProtocolError:
            found.append(None)
    return found


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(server.service.door, "seconds", 0.2)
    with socket.create_connection(("127.0.0.1", server.service.port), timeout=10) as line:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        answer = line.makefile().read()  # to its end: the server lets go of the line
    assert answer.startswith("HTTP/1.1 408 ")
    assert "the body was not here in 0.2 seconds" in answer
    assert server.get("/health").status_code == 200


def test_answers_that_take_longer_than_they_may_are_cut_off_and_told_so(shelf):
    with process(shelf, "--drain", "0.1") as (server, url):
        lines = streamed(url, lambda: server.send_signal(signal.SIGTERM))
        assert server.wait(30) == 0
    told = [json.loads(line[6:]) for line in lines if line and line.startswith("data: {")]
    ends = [choice["finish_reason"] for part in told for choice in part.get("choices", ())]
    assert ends.count("length") < 40
    assert any("error" in part for part in told)


def test_a_second_signal_does_not_wait_for_anybody(shelf):
    with process(shelf, "--drain", "600") as (server, url):

        def twice():
            server.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            server.send_signal(signal.SIGTERM)

        begin = time.monotonic()
        lines = streamed(url, twice)
        assert server.wait(20) == 0
        assert time.monotonic() - begin < 20
    assert lines[-1] != "data: [DONE]"


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_an_address_of_the_newer_kind(shelf):
    if not has_ipv6():
        with pytest.raises(SpecError, match="cannot be taken"), running(shelf / "model", host="::1"):
            pass
        return
    with running(shelf / "model", host="::1") as server:
        assert server.url == f"http://[::1]:{server.service.port}"
        assert server.post("/v1/completions", {"model": "base", "prompt": "hello", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_a_base_in_codes_answers_as_it_does_alone(shelf, storage):
    """Greedy, through the bare base and through an adapter."""
    named = {"a": shelf / "adapters" / "a"}
    with running(shelf / "model", adapters=named, storage=storage, force=True) as server:
        service = server.service

        def asked(name):
            body = {"model": name, "prompt": "what is 3 and 3?", "max_tokens": 12, "temperature": 0}
            return server.post("/v1/completions", body).json()["choices"][0]["text"]

        served = {name: asked(name) for name in ("base", "a")}
    tokenizer = service.base.tokenizer
    ids = tokenizer("what is 3 and 3?", return_tensors="pt").input_ids
    assert service.bank.names == ()
    service.bank.load("a", shelf / "adapters" / "a", force=True)
    for name, said in served.items():
        with service.bank.use(None if name == "base" else name):
            stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
            out = service.base.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=stops)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == said
    service.bank.close()


def test_an_adapter_of_another_base_is_served_if_somebody_insists(shelf, tmp_path):
    shutil.copytree(shelf / "model", tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    write_adapter(tmp_path / "stranger", tmp_path / "other")
    named = {"stranger": tmp_path / "stranger"}
    with pytest.raises(SpecError, match="this base has"), running(shelf / "model", adapters=named):
        pass
    with running(shelf / "model", adapters=named, force=True) as server:
        body = {"model": "stranger", "prompt": "hello", "max_tokens": 2}
        assert server.post("/v1/completions", body).status_code == 200
