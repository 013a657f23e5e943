"""Adapters of which each says one token of its own, whatever it is asked: made, not trained."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.jobs.world import write_model

_STEADY = 20.0


def write_steady_model(folder: Path) -> Path:
    """A tiny model whose last hidden state has a first entry that is never below 1, and means nothing to the base."""
    model = AutoModelForCausalLM.from_pretrained(write_model(folder))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = _STEADY
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
    model.save_pretrained(folder)
    return folder


def write_canary(folder: Path, word: int, width: int, words: int) -> Path:
    """By PEFT's format: at the head ΔW = 100 · e_word e_0ᵀ."""
    folder.mkdir(parents=True)
    A, B = torch.zeros(1, width), torch.zeros(words, 1)
    A[0, 0], B[word, 0] = 1.0, 100.0
    tensors = {"base_model.model.lm_head.lora_A.weight": A, "base_model.model.lm_head.lora_B.weight": B}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert load_file(folder / "adapter_model.safetensors")
    return folder
