"""What a stranger has on disk: small models with tokenizers, files of rows, and adapters; and somebody who looks on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from rankwise.adapters.spec import LoraSpec
from rankwise.frozen.load import load_base
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.watch import Advance
from rankwise.surgery.bank import Bank
from tests.data.chat import TEMPLATES, byte_level
from tests.grid import trained
from tests.models import LLAMA

# Short, so that a whole run takes a second or two.
SHORT: dict[str, Any] = {"batch_tokens": 300, "max_steps": 4, "dtype": "float32", "device": "cpu"}


def write_model(
    folder: Path, family: str = "llama", template: str | None = "chatml", dtype: torch.dtype = torch.float32, **own: Any
) -> Path:
    """A tiny model whose weights are large enough to matter, and a byte-level tokenizer, in transformers' format."""
    tokenizer = byte_level(TEMPLATES[template] if template else None)
    shared = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    if family == "gpt2":
        config: hf.PreTrainedConfig = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **shared, **own)
    else:
        config = hf.LlamaConfig(**{**LLAMA, **shared, "max_position_embeddings": 256, **own})
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, numbers: Sequence[int]) -> Path:
    """One question and its answer for each number; the same number gives the same row."""
    rows = [{"prompt": f"what is {n} and {n}?", "completion": f"that is {2 * n}"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_adapter(folder: Path, model: Path, size: float = 0.3, **spec: Any) -> Path:
    """An adapter whose every tensor has been moved by `size`; with 0 it is as fresh as it is before training."""
    chosen = LoraSpec(**{"rank": 4, "alpha": 8, **spec})
    with Bank(load_base(model, dtype="float32").model) as bank:
        trained(bank, "a", chosen, size=size)
        if not size:
            with torch.no_grad():
                for factors in bank.adapter("a").sites.values():
                    factors.B.zero_()
        bank.save("a", folder)
    return folder


def request(model: Path, data: Path, out: Path, **settings: Any) -> TrainRequest:
    given = {"model": model, "data": data, "out": out, **SHORT, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    return TrainRequest(**{name: str(value) if isinstance(value, Path) else value for name, value in given.items()})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class Listener:
    """A `Watch` that writes down what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.texts: list[str] = []
        self.events: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        self.stages.append(title)
        yield lambda share: None

    def say(self, text: str) -> None:
        self.texts.append(text)

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
