"""Whether llama.cpp itself, given the GGUF that `convert` writes, computes what the adapter is here.

    pip install llama-cpp-python gguf        # compiles llama.cpp: a quarter of an hour on two cores
    python benchmarks/llama_check.py --model DIR [--tokens 20]

The base is written as GGUF in float32 (a Llama with tied embeddings, without its tokenizer: tokens go in as numbers).
An adapter with patterns of ranks and alphas and with rsLoRA's scaling is drawn at random and converted.  Both sides
read a text and continue it, bare and through the adapter, keys and values in float32.  Prints one JSON object: the
largest difference of logits, as a share of the largest logit, and whether the greedy tokens are the same; exits with 1
where they are not, or logits differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from where import machine

from rankwise.adapters.spec import LoraSpec
from rankwise.frozen.load import load_base
from rankwise.surgery.bank import Bank

TEXT = "The lighthouse keeper wrote in his diary every evening, and"
COMMAND = shutil.which("rankwise", path=Path(sys.executable).parent) or "rankwise"
SPEC = LoraSpec(
    rank=8,
    alpha=16,
    targets="all-linear",
    scaling="alpha/sqrt(r)",
    rank_pattern={"q_proj": 4, "down_proj": 12},
    alpha_pattern={"v_proj": 5},
)
Said = tuple[np.ndarray, list[int]]  # logits of the text, and the tokens that continue it


def write_base(model: Any, path: Path) -> None:
    """As llama.cpp's converter does: rotary halves of queries and keys are interleaved."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        path, weight = name.removesuffix(".weight"), tensor.float().numpy()
        if path == "lm_head":  # the embedding again
            continue
        if count := heads.get(path.rpartition(".")[2]):
            halves = weight.reshape(count, 2, -1, weight.shape[1])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        file.add_tensor(f"{names.get_name(path)}.weight", weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@torch.no_grad()
def here(model: Any, ids: list[int], count: int) -> Said:
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return model(torch.tensor([ids])).logits[0].double().numpy(), tokens[len(ids) :]


def there(base: Path, adapter: Path | None, ids: list[int], count: int) -> Said:
    wide = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter),
        logits_all=True,
        n_ctx=len(ids) + count,
        type_k=wide,
        type_v=wide,
        verbose=False,
    )
    model.eval(ids)
    logits, tokens = np.array(model.scores[: len(ids)], dtype=np.float64), list(ids)
    for _ in range(count):
        tokens.append(int(model.scores[len(tokens) - 1].argmax()))
        model.eval(tokens[-1:])
    return logits, tokens[len(ids) :]


def compare(model: str, count: int, place: Path) -> dict[str, Any]:
    base, folder, converted = place / "base.gguf", place / "adapter", place / "adapter.gguf"
    loaded = load_base(model, dtype="float32", device="cpu")
    write_base(loaded.model, base)
    ids = loaded.tokenizer.encode(TEXT)
    torch.manual_seed(1)
    ours = {}
    with Bank(loaded.model) as bank:
        bank.add("a", SPEC)
        for factors in bank.adapter("a").sites.values():
            torch.nn.init.normal_(factors.B, std=0.02)
        bank.save("a", folder)
        for name in (None, "a"):
            with bank.use(name):
                ours[name] = here(loaded.model, ids, count)
    asked = [COMMAND, "convert", folder, "--to", "gguf", "--model", model, "--out", converted]
    subprocess.run(list(map(str, asked)), check=True, stdout=subprocess.DEVNULL)
    found = {}
    for name, (logits, tokens) in ours.items():
        got, said = there(base, None if name is None else converted, ids, count)
        apart = float(np.abs(got - logits).max() / np.abs(logits).max())
        found["base" if name is None else "adapter"] = {"logits_apart": apart, "same_tokens": said == tokens}
    moved = float(np.abs(ours["a"][0] - ours[None][0]).max() / np.abs(ours[None][0]).max())
    return found | {"adapter_moves_logits_by": moved, "tokens": count}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(asked.model, asked.tokens, Path(folder))
    print(
        json.dumps({"model": Path(asked.model).name, **found, "machine": machine("llama-cpp-python", "gguf")}, indent=2)
    )
    agree = all(found[side]["same_tokens"] and found[side]["logits_apart"] < 1e-4 for side in ("base", "adapter"))
    return 0 if agree and found["adapter_moves_logits_by"] > 1e-2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
