"""The world of the tasks beside causal language models: a small base for each, and files of what it can learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from torch import nn

from tests.data.chat import framed
from tests.models import BERT, LLAMA

PAD = framed().pad_token_id
CLASSES = ("bad", "good", "neutral")
_SHARED = {"vocab_size": len(framed()), "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {**BERT, **_SHARED}


def write_base(folder: Path, family: str) -> Path:
    """A checkpoint as people have it: none of them knows the classes."""
    builds = {
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_BERT)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, **_SHARED, "pad_token_id": None})),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD, **_SHARED)
        ),
        "vit": lambda: hf.ViTModel(_vit()),
    }
    torch.manual_seed(0)
    settled(builds[family]()).save_pretrained(folder)
    if family != "vit":
        framed().save_pretrained(folder)
    return folder


def _vit() -> hf.ViTConfig:
    return hf.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_channels=1,
    )


def settled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def write_labelled(path: Path, numbers: Sequence[int], *, named: bool = True) -> Path:
    """Texts that say which class they are of."""
    rows = []
    for number in numbers:
        label = number % 3
        row = {"text": f"this {number} is {CLASSES[label]} {'!' * (number % 7)}", "label": label}
        rows.append(row | ({"label_name": CLASSES[label]} if named else {}))
    return _written(path, rows)


def write_texts(path: Path, numbers: Sequence[int]) -> Path:
    return _written(path, [{"text": f"the user asks {number}: what is a good answer?"} for number in numbers])


def write_pairs(path: Path, numbers: Sequence[int]) -> Path:
    return _written(path, [{"source": f"say {number} twice", "target": f"{number} {number}"} for number in numbers])


def _written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pictures(path: Path, count: int = 24) -> Path:
    """An .npz of grey pictures, bright above or below, in three parts that share no picture."""
    arrays = {"class_names": np.array(["above", "below"])}
    for seed, part in enumerate(("train", "valid", "test")):
        generator = np.random.default_rng(seed)
        labels = np.arange(count) % 2
        x = generator.integers(60, size=(count, 20, 20)).astype(np.uint8)
        x[labels == 0, :10] += 150
        x[labels == 1, 10:] += 150
        arrays |= {f"x_{part}": x, f"y_{part}": labels}
    np.savez(path, **arrays)
    return path


BASES = {
    "masked-lm": "bert",
    "seq2seq": "t5",
    "sequence-classification": "bert",
    "image-classification": "vit",
}


def write_task(folder: Path, task: str) -> dict[str, Path]:
    """The base and the files of a task, by the options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    base = write_base(folder / "base", BASES[task])
    if task == "image-classification":
        pictures = write_pictures(folder / "pictures.npz")
        return {"model": base, "data": pictures, "valid": pictures, "test": pictures}
    write = {"masked-lm": write_texts, "seq2seq": write_pairs, "sequence-classification": write_labelled}[task]
    ranges = {"data": range(100, 148), "valid": range(200, 212), "test": range(300, 318)}
    return {"model": base} | {name: write(folder / f"{name}.jsonl", numbers) for name, numbers in ranges.items()}
