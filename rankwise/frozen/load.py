"""A base model and its tokenizer, from a folder or the Hugging Face hub, held in a format the machine is good at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rankwise.errors import ModelError
from rankwise.frozen.precision import Precision, choose_precision


@dataclass(frozen=True)
class Base:
    """What was loaded and how it is held.

    Attributes:
        stored: the number format of the weights on disk, as the model's config says; float32 where it does not.
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    precision: Precision
    stored: torch.dtype


def load_base(name: str | Path, *, dtype: str = "auto", device: str = "auto") -> Base:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder with config.json, or a model's id on the hub.  Code in a repository is never run.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        device: `auto` (a GPU when there is one), or as torch names them.

    Raises:
        ModelError: it cannot be found or read, or is no causal language model; says the way out.
    """
    source = str(name)
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(place, dtype)
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source)
        stored = getattr(config, "dtype", None) or torch.float32
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=precision.dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{source}: cannot be loaded: {_first_line(error)}", hint=_way_out(source)) from None
    return Base(source, model.to(place).eval(), tokenizer, place, precision, stored)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _way_out(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        return "a model's folder holds config.json, the weights as .safetensors, and the tokenizer's files"
    if path.is_absolute() or source.startswith((".", "~")):
        return "no such folder; give the folder that holds config.json"
    return "give a folder that holds the model, or check the id and the connection to the hub"
