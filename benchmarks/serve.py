"""What serving many adapters costs: the engine against its own bare base, transformers' `generate` and PEFT's batches.

    python benchmarks/serve.py --model DIR [--dtype bfloat16] [--adapters 16] [--tokens 48] [--rounds 5] [--peft]

Adapters of rank 16 on all linear layers with B drawn at random, prompts of random tokens, greedy answers of a fixed
length.  Sides take turns, and the median over the rounds counts.  Sides:

    base, mixed      as many requests at once as there are adapters: all of the base, or one of each adapter
    one, one merged  a single stream through one adapter, unmerged and merged, and through the base (one base)
    generate         transformers' own, the bare base, a single stream
    peft mixed       PEFT, one batch with `adapter_names`
    peft switched    PEFT, one after the other with `set_adapter`, a part of them
    load             an adapter from disk between two steps until it is served
    made current     answers of one token, each through another adapter than the one before, less those through the same

Prints one JSON object: tokens a second of each side (new tokens over the whole time, prompts included), milliseconds of
the loads, and the ratios that docs/serving.md has goals for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from where import machine

from rankwise.adapters.spec import LoraSpec
from rankwise.serving.engine import Engine
from rankwise.serving.requests import Finished, Token, Wanted
from rankwise.surgery.bank import Bank

GOALS = {
    "mixed/base": 0.85,
    "mixed/peft mixed": 3.0,
    "mixed/peft switched": 6.0,
    "one/generate": 1.5,
    "one merged/one base": 1.0,
}
SWITCHED = 4  # requests of the slowest side
LOADS = 15  # the first ones find memory that the heap has not held before
SWITCHES = 60


def prompts(words: int, count: int, size: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(10, words, (size,), generator=generator).tolist()) for _ in range(count)]


def moved(bank: Bank, name: str, seed: int) -> None:
    bank.add(name, LoraSpec(rank=16, alpha=16, targets="all-linear"), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part, parameter in bank.named_parameters(name):
            if part.endswith(".B"):
                parameter.normal_(std=0.01, generator=generator)


class Sides:
    """The engine and the others, over the same prompts."""

    def __init__(self, arguments: argparse.Namespace, place: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.tokens, self.names = arguments.tokens, [f"a{i}" for i in range(arguments.adapters)]
        kind = getattr(torch, arguments.dtype)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=kind).eval()
        self.prompts = prompts(model.config.vocab_size, len(self.names), arguments.prompt)
        self.bank = Bank(model)
        for seed, name in enumerate(self.names):
            moved(self.bank, name, seed)
            self.bank.save(name, place / name)
        self.place = place
        self.engine = Engine(self.bank, cache_bytes=1 << 28)
        self.other = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=kind).eval()
        self.peft: Any = None
        if arguments.peft:
            from peft import PeftModel

            self.peft = PeftModel.from_pretrained(self.other, place / "a0", adapter_name="a0").eval()
            for name in self.names[1:]:
                self.peft.load_adapter(place / name, adapter_name=name)
            # The bare base of `generate` must not pay for PEFT's wrappers.
            self.other = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=kind).eval()

    # ── sides: each answers and gives how many tokens came ───────────────────────────────────────────────────────

    def served(self, names: Sequence[str | None]) -> int:
        over = threading.Semaphore(0)
        counted = [0]

        def listen(what: Token | Finished) -> None:
            if isinstance(what, Token):
                counted[0] += 1
            else:
                over.release()

        for name, prompt in zip(names, self.prompts, strict=False):
            self.engine.submit(Wanted(prompt, name, max_new_tokens=self.tokens), listen)
        for _ in names:
            over.acquire()
        # Nothing of a prompt is to be found again in the next round.
        self.engine.between_steps(self.engine.forget).result()
        return counted[0]

    def base(self) -> int:
        return self.served([None] * len(self.names))

    def mixed(self) -> int:
        return self.served(self.names)

    def one(self) -> int:
        return self.served(["a0"])

    def one_base(self) -> int:
        return self.served([None])

    def one_merged(self) -> int:
        return self.served(["a0"])

    def generate(self) -> int:
        return self._generated(self.other, self.prompts[:1])

    def peft_mixed(self) -> int:
        return self._generated(self.peft, self.prompts, adapter_names=self.names)

    def peft_switched(self) -> int:
        count = 0
        for name, prompt in zip(self.names[:SWITCHED], self.prompts, strict=False):
            self.peft.set_adapter(name)
            count += self._generated(self.peft, [prompt])
        return count

    @torch.no_grad()
    def _generated(self, model: Any, rows: Sequence[tuple[int, ...]], **named: Any) -> int:
        ids = torch.tensor(rows)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            do_sample=False,
            pad_token_id=0,
            **named,
        )
        return int(out[:, ids.shape[1] :].numel())

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it an adapter is merged into the base."""
        self.engine.between_steps(lambda: self.bank.merge("a0")).result()
        self._taken_in()
        yield
        self.engine.between_steps(self.bank.unmerge).result()
        self._taken_in()

    def _taken_in(self) -> None:
        """The engine has found out what a change made of the bank: it does so after it has told that it is made."""
        self._exchange(lambda: None)

    # ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def loads(self, times: int) -> dict[str, float]:
        """Milliseconds, medians: from disk until the bank can be served again, and a request for another adapter."""
        found = []
        for i in range(times + 1):
            begin = time.perf_counter()
            self._exchange(lambda i=i: self.bank.load(f"b{i}", self.place / "a0"))  # type: ignore[misc]
            self._taken_in()
            found.append(1e3 * (time.perf_counter() - begin))
            self._exchange(lambda i=i: self.bank.remove(f"b{i}"))  # type: ignore[misc]
        return {"from disk": statistics.median(found[1:]), "made current": self.switches(SWITCHES)}

    def _exchange(self, work: Callable[[], None]) -> None:
        """Adapters alone come and go."""
        self.engine.between_steps(work, members_only=True).result()

    def switches(self, times: int) -> float:
        """Milliseconds that it costs a request to go through another adapter than the one before."""
        length, self.tokens = self.tokens, 1
        spent: dict[str, list[float]] = {"same": [], "other": []}
        for i in range(2 * times):
            kind = "other" if i % 2 else "same"
            self.served(["a0" if kind == "same" else "a1"])
            begin = time.perf_counter()
            self.served(["a0"])
            spent[kind].append(1e3 * (time.perf_counter() - begin))
        self.tokens = length
        return statistics.median(spent["other"]) - statistics.median(spent["same"])


def timed(side: Callable[[], int]) -> float:
    begin = time.perf_counter()
    return side() / (time.perf_counter() - begin)


def measured(sides: Sides, rounds: int, *, peft: bool) -> dict[str, Any]:
    engine = sides.engine
    order = [
        "base",
        "mixed",
        "one",
        "one_base",
        "one_merged",
        "generate",
        *(["peft_mixed", "peft_switched"] if peft else []),
    ]
    engine.start()
    rates: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name in order if turn % 2 else reversed(order):
            with sides.merged() if name == "one_merged" else nullcontext():
                rate = timed(getattr(sides, name))
            rates.setdefault(name, []).extend([rate] if turn else [])  # the first round warms up
    loads = sides.loads(LOADS)
    engine.stop()
    median = {name.replace("_", " "): statistics.median(found) for name, found in rates.items()}
    every = {name: [round(rate, 1) for rate in found] for name, found in rates.items()}
    ratios = {}
    for pair, goal in GOALS.items():
        a, b = pair.split("/")
        if a in median and b in median:
            ratios[pair] = {"ratio": round(median[a] / median[b], 3), "goal": goal}
    shown = {name: round(rate, 2) for name, rate in median.items()}
    return {"tokens_per_second": shown, "ratios": ratios, "load_ms": loads, "rounds": every}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft", action="store_true", help="measure PEFT too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sides = Sides(arguments, Path(place))
        found = measured(sides, arguments.rounds, peft=arguments.peft)
    facts = {"model": Path(arguments.model).name, "dtype": arguments.dtype, "threads": torch.get_num_threads()}
    sizes = {"adapters": arguments.adapters, "prompt": arguments.prompt, "tokens": arguments.tokens}
    print(json.dumps(facts | sizes | {"machine": machine("peft")} | found, indent=1))


if __name__ == "__main__":
    main()
