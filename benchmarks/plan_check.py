"""`rankwise plan` against real training steps, and how long a plan of a 70B model takes.

    python benchmarks/plan_check.py --model DIR

DIR holds a small Llama-like model (SmolLM2-135M-Instruct).  Fifteen configurations, each in a process of its own: the
peak that was predicted against the highest resident size up to the end of two steps.  The tiny models are made on the
spot, with DIR's tokenizer.  Prints one JSON object; the goals are 10 % and 1 s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GOAL, GOAL_SECONDS = 0.10, 1.0
COMMAND = shutil.which("rankwise", path=Path(sys.executable).parent) or "rankwise"
SHORT = ["--document-tokens", "256"]
CONFIGURATIONS: dict[str, tuple[str, list[str]]] = {
    "bfloat16, rank 16": ("given", ["--dtype", "bfloat16", *SHORT]),
    "bfloat16, rank 64": ("given", ["--dtype", "bfloat16", "--rank", "64", *SHORT]),
    "bfloat16, attention, rank 8": ("given", ["--dtype", "bfloat16", "--targets", "attention", "--rank", "8", *SHORT]),
    "bfloat16, minimal, rank 4, 1024 tokens": (
        "given",
        ["--dtype", "bfloat16", "--targets", "minimal", "--rank", "4", "--batch-tokens", "1024", *SHORT],
    ),
    "bfloat16, checkpointing": ("given", ["--dtype", "bfloat16", "--checkpointing", *SHORT]),
    "bfloat16, 40 % supervised": ("given", ["--dtype", "bfloat16", "--supervised", "0.4", "--document-tokens", "512"]),
    "bfloat16, dora": ("given", ["--dtype", "bfloat16", "--method", "dora", *SHORT]),
    "bfloat16, adalora": ("given", ["--dtype", "bfloat16", "--method", "adalora", *SHORT]),
    "bfloat16, qlora": ("given", ["--dtype", "bfloat16", "--method", "qlora", *SHORT]),
    "bfloat16, full": ("given", ["--dtype", "bfloat16", "--method", "full", *SHORT]),
    "float32, full, 512 tokens": (
        "given",
        ["--dtype", "float32", "--method", "full", "--batch-tokens", "512", *SHORT],
    ),
    "float32, 512 tokens": ("given", ["--dtype", "float32", "--batch-tokens", "512", *SHORT]),
    "float32, checkpointing": (
        "given",
        ["--dtype", "float32", "--batch-tokens", "1024", "--checkpointing", *SHORT],
    ),
    "tiny llama, float32, dropout": ("llama", ["--dtype", "float32", "--dropout", "0.1", *SHORT]),
    "tiny gpt2, float32": ("gpt2", ["--dtype", "float32", *SHORT]),
}
SEVENTY = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}


def write_tiny(folder: Path, family: str, tokenizer: Path) -> Path:
    """A model of a few layers with random weights, and the tokenizer of another."""
    import transformers as hf

    words = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config: hf.PreTrainedConfig
    if family == "gpt2":
        config = hf.GPT2Config(vocab_size=words, n_embd=256, n_layer=6, n_head=4, n_positions=2048)
    else:
        config = hf.LlamaConfig(
            vocab_size=words, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4
        )
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in tokenizer.glob("token*"):
        shutil.copy(path, folder)
    return folder


def check(model: Path, options: list[str]) -> dict[str, Any]:
    command = [COMMAND, "plan", "--model", str(model), "--device", "cpu", *options, "--measure", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    found = json.loads(done.stdout)["measured"]
    return {
        "options": " ".join(options),
        "predicted_bytes": found["predicted"],
        "measured_bytes": found["peak"],
        "process_bytes": found["process"],
        "error": found["predicted"] / found["peak"] - 1,
    }


def seconds_for_seventy(folder: Path) -> dict[str, float]:
    """The whole command, interpreter's start included, and the call alone; the best of three."""
    from rankwise.planning.plan import plan

    path = folder / "config.json"
    path.write_text(json.dumps(SEVENTY))
    found: dict[str, list[float]] = {"command": [], "call": []}
    for _ in range(3):
        begun = time.perf_counter()
        command = [COMMAND, "plan", "--model", str(path), "--device", "cuda", "--memory", "80GiB", "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found["command"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        plan(path, device="cuda", memory="80GiB")
        found["call"].append(time.perf_counter() - begun)
    return {name: min(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    given = parser.parse_args().model.expanduser()
    with tempfile.TemporaryDirectory() as name:
        models = {"given": given} | {kind: write_tiny(Path(name) / kind, kind, given) for kind in ("llama", "gpt2")}
        seconds = seconds_for_seventy(Path(name))
        found = {}
        for title, (kind, options) in CONFIGURATIONS.items():
            found[title] = check(models[kind], options)
            print(f"{title}: {found[title]['error']:+.1%}", file=sys.stderr, flush=True)
    worst = max(abs(one["error"]) for one in found.values())
    print(
        json.dumps(
            {
                "what": "predicted peak memory against measured",
                "model": given.name,
                "configurations": found,
                "worst_error": worst,
                "within_goal": sum(abs(one["error"]) <= GOAL for one in found.values()),
                "seconds_for_70b": seconds,
                "seventy_in_time": seconds["command"] <= GOAL_SECONDS,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
