"""A thousand adapters behind one server, few of them in memory, asked at random: is every answer its own, and how soon?

    python benchmarks/serve_traffic.py [--model DIR] [--adapters 1000] [--resident 32] [--requests 2000] [--streams 16]

Every adapter says a token of its own, its canary.  They are made, not trained: at the head ΔW = b · e_token uᵀ, where u
is a direction along which the last hidden states of texts like those that are asked lie near 1, by ridge regression;
`least_state_along_u` is how near.  Beside it are factors of rank 8 at every q_proj and v_proj, small ones, so that what
is read, kept and computed is more than a head.

Prints one JSON object; exits with 1 if any answer was another than its adapter's or any status not 200.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from where import machine

from rankwise.cache import cache_folder
from rankwise.frozen.load import load_base
from rankwise.frozen.packaged import packaged_model

TEXTS = ("What is two and two?", "def answer(question):", "Tell me of the sea.", "The quick brown fox", "1, 2, 3,")
RANK, LENGTH = 8, 4
_RIDGE = 50.0
COMMAND = shutil.which("rankwise", path=Path(sys.executable).parent) or "rankwise"


class Aviary:
    """Canaries of a model."""

    def __init__(self, model: Path) -> None:
        base = load_base(model, dtype="float32", device="cpu")
        self.tokenizer = base.tokenizer
        inner, self.words = base.model.base_model, base.model.get_output_embeddings().weight.shape[0]
        self.sites = {
            path: layer.weight.shape
            for path, layer in base.model.named_modules()
            if path.endswith(("q_proj", "v_proj"))
        }
        decoded = ((i, self.tokenizer.decode([i])) for i in range(1000, self.words))
        self.own = [i for i, text in decoded if text.strip().isalpha() and text.isascii()]
        chance = random.Random(0)
        states = []
        with torch.no_grad():
            for text in (f"{text} ({number})" for text in TEXTS for number in range(0, 2000, 50)):
                ids = self.tokenizer.encode(text) + [chance.choice(self.own)] * LENGTH  # as they are answered
                states.append(inner(input_ids=torch.tensor([ids])).last_hidden_state[0, -LENGTH - 1 :])
        x = torch.cat(states)
        self.u = torch.linalg.solve(x.T @ x + _RIDGE * torch.eye(x.shape[1]), x.sum(0))
        self.least = float((x @ self.u).min())

    def write(self, folder: Path, number: int) -> str:
        """One adapter; what it says."""
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        token = self.own[number % len(self.own)]
        B = torch.zeros(self.words, 1)
        B[token] = 1000.0
        tensors = {"lm_head.lora_A": self.u.unsqueeze(0), "lm_head.lora_B": B}
        for path, (outputs, inputs) in self.sites.items():
            tensors[f"{path}.lora_A"] = torch.randn(RANK, inputs, generator=generator) * 0.01
            tensors[f"{path}.lora_B"] = torch.randn(outputs, RANK, generator=generator) * 0.001
        stored = {f"base_model.model.{name}.weight": tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(stored, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
        config |= {"rank_pattern": {"lm_head": 1}, "alpha_pattern": {"lm_head": 1}}
        config["target_modules"] = ["q_proj", "v_proj", "lm_head"]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return str(self.tokenizer.decode([token] * LENGTH))


def resident_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


async def ask(client: httpx.AsyncClient, name: str, text: str) -> tuple[int, str, float]:
    """Status, answer, and seconds to the first token."""
    body = {"model": name, "prompt": text, "max_tokens": LENGTH, "temperature": 0, "stream": True}
    begun, first, said = time.perf_counter(), 0.0, ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begun
                said += "".join(choice["text"] for choice in json.loads(line[6:]).get("choices", ()))
        return answer.status_code, said, first


async def traffic(url: str, process: int, own: dict[str, str], asked: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(asked.seed)
    jobs = [(chance.choice(list(own)), f"{chance.choice(TEXTS)} ({number})") for number in range(asked.requests)]
    waiting, found, memory = iter(jobs), [], [resident_bytes(process)]
    begun = time.perf_counter()

    async def stream(client: httpx.AsyncClient) -> None:
        for name, text in waiting:
            found.append((name, *await ask(client, name, text)))
            if len(found) % max(1, asked.requests // 8) == 0:
                memory.append(resident_bytes(process))

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await asyncio.gather(*(stream(client) for _ in range(asked.streams)))
        metrics = (await client.get("/metrics")).text
    seconds = time.perf_counter() - begun
    firsts = sorted(first for _, status, _, first in found if status == 200)
    counted = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if line[:9] == "rankwise_"}
    return {
        "requests": len(found),
        "not_200": sum(status != 200 for _, status, _, _ in found),
        "wrong": sum(status == 200 and said != own[name] for name, status, said, _ in found),
        "of_another_adapter": sum(said != own[name] and said in own.values() for name, _, said, _ in found),
        "seconds": seconds,
        "first_token": {
            "median": statistics.median(firsts),
            "p95": firsts[int(0.95 * (len(firsts) - 1))],
            "most": firsts[-1],
        },
        "adapter_loads": counted["rankwise_adapter_loads_total"],
        "adapter_load_seconds": counted["rankwise_adapter_load_seconds_total"],
        "resident_bytes": memory,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    for name, value in (("adapters", 1000), ("resident", 32), ("requests", 2000), ("streams", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cache", type=float, default=0.03125, help="GiB of keys and values, full by a third")
    asked = parser.parse_args()
    model = asked.model or packaged_model(cache_folder())
    with tempfile.TemporaryDirectory() as folder:
        aviary = Aviary(model)
        own = {f"canary-{n}": aviary.write(Path(folder, f"canary-{n}"), n) for n in range(asked.adapters)}
        line = [COMMAND, "serve", "--model", model, "--adapters-dir", folder, "--max-loaded", asked.resident]
        line += ["--port", 0, "--cache", asked.cache, "--json"]
        server = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            told = json.loads(server.stdout.readline())
            found = asyncio.run(traffic(told["url"], server.pid, own, asked))
        finally:
            server.terminate()
            server.wait(60)
    setting = {"model": model.name, "adapters": asked.adapters, "resident": asked.resident, "streams": asked.streams}
    made = {"canaries": "made, not trained", "least_state_along_u": aviary.least}
    print(json.dumps({"what": "serve traffic", **setting, **made, **found, "machine": machine()}, indent=2))
    return int(bool(found["wrong"] or found["not_200"]))


if __name__ == "__main__":
    sys.exit(main())
