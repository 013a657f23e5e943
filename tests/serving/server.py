"""A server in a thread of the tests' process, on a free port, for the length of a `with`; and what PEFT answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.jobs.watch import Quiet
from rankwise.serving.service import ServeRequest, Service

TINY: dict[str, Any] = {"port": 0, "dtype": "float32", "device": "cpu", "cache_bytes": 1 << 23}


class Running:
    """A service, and clients of it."""

    def __init__(self, service: Service, told: dict[str, Any]) -> None:
        self.service, self.told, self.url = service, told, service.url
        self.key = service.asked.api_key or "none"

        self._client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def openai(self) -> openai.OpenAI:
        return self._client

    def close(self) -> None:
        self._client.close()

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60, **more)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics", headers={"Authorization": f"Bearer {self.key}"}).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


@contextmanager
def running(model: Path, **asked: Any) -> Iterator[Running]:
    service = Service(ServeRequest(model=str(model), **{**TINY, **asked}), Quiet())
    told: list[dict[str, Any]] = []
    failed: list[BaseException] = []
    ready = threading.Event()

    def hear(found: dict[str, Any]) -> None:
        told.append(found)
        ready.set()

    def run() -> None:
        try:
            service.run(hear)
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    if failed:
        thread.join()
        raise failed[0]
    found = Running(service, told[0])
    try:
        yield found
    finally:
        found.close()
        service.close()
        thread.join(60)
        assert not thread.is_alive()


class Reference:
    """What transformers and PEFT make of it, one adapter at a time."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.stops = [self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<|im_end|>")]
        self._loaded: dict[Path | None, Any] = {}

    def loaded(self, adapter: Path | None) -> Any:
        if adapter not in self._loaded:
            plain = AutoModelForCausalLM.from_pretrained(self.model)
            found = plain if adapter is None else PeftModel.from_pretrained(plain, adapter)
            self._loaded[adapter] = found.eval()
        return self._loaded[adapter]

    def chat(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        shown = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(shown, add_special_tokens=False))

    @torch.no_grad()
    def tokens(self, adapter: Path | None, prompt: list[int], length: int) -> list[int]:
        ids = torch.tensor([prompt])
        plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        told = {"max_new_tokens": length, "eos_token_id": self.stops, "pad_token_id": self.stops[0], **plain}
        out = self.loaded(adapter).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **told)
        return list(map(int, out[0, len(prompt) :]))

    def text(self, adapter: Path | None, prompt: list[int], length: int) -> str:
        said = [token for token in self.tokens(adapter, prompt, length) if token not in self.stops]
        return str(self.tokenizer.decode(said, skip_special_tokens=True))

    @torch.no_grad()
    def logprobs(self, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
        """`[N, words]`: of what comes after each."""
        out = self.loaded(adapter)(input_ids=torch.tensor([tokens])).logits[0]
        return out.double().log_softmax(-1)
