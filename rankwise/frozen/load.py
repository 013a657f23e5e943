"""A base model and its tokenizer, from a folder or the Hugging Face hub, held in a format the machine is good at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rankwise.errors import ModelError, SpecError, listing
from rankwise.frozen.precision import Precision, choose_precision
from rankwise.frozen.storing import StorageConfig, misfits
from rankwise.kernels.sizes import Storage


@dataclass(frozen=True)
class Base:
    """What was loaded and how it is held.

    Attributes:
        stored: the number format of the weights on disk, as the model's config says; float32 where it does not.
        storage: how the weights of its linear layers are held: as they are, or in codes (frozen/coded.py).
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    precision: Precision
    stored: torch.dtype
    storage: Storage = "dense"


def load_base(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    storage: Storage = "dense",
    remainder_rank: int = 0,
) -> Base:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder with config.json, or a model's id on the hub.  Code in a repository is never run, pickled weights
            are never opened.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        device: `auto` (a GPU when there is one), or as torch names them.
        storage: `dense`, or `int8` or `nf4` for the linear layers, which are put in codes one by one as they are read.
        remainder_rank: keep so much of what that takes away, for `init="loftq"`.

    Raises:
        ModelError: it cannot be found or read, lacks weights, or is no causal language model; says the way out.
        SpecError: no such number format, or no such device here.
    """
    source = _source(name)
    place = _place(device)
    precision = choose_precision(place, dtype)
    logging.disable_progress_bar()
    config = _read(source, "config", AutoConfig)
    stored = getattr(config, "dtype", None) or torch.float32
    tokenizer = _read(source, "tokenizer", AutoTokenizer)
    codes = None if storage == "dense" else StorageConfig(storage, remainder_rank)
    model = _read_weights(source, config, precision.dtype, codes)
    return Base(source, model.to(place).eval(), tokenizer, place, precision, stored, storage)


def read_tokenizer(folder: Path) -> Any:
    """A tokenizer by itself, from a folder.  Code that comes with it is never run.

    Raises:
        ModelError: it cannot be read; says why.
    """
    return _read(str(folder), "tokenizer", AutoTokenizer)


def read_config(name: str | Path) -> Any:
    """A model's config, by transformers' own class for it.  Code in a repository is never run.

    Raises:
        ModelError: it cannot be found or read, or needs code of its own; says the way out.
    """
    return _read(_source(name), "config", AutoConfig)


def read_outline(name: str | Path) -> Any:
    """The causal language model that a config describes, on the meta device: without memory for its weights.

    Raises:
        ModelError: as `read_config`, or no such model can be built from it.
    """
    source, config = _source(name), read_config(name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # numbers that make no sense raise whatever the model's own code trips over
        reason = _first_line(error)
        raise ModelError(f"{source}: its config makes no model: {reason}", hint=_way_out(source)) from error


def _read_weights(source: str, config: Any, dtype: torch.dtype, codes: StorageConfig | None) -> Any:
    """The model; where a weight is missing or has another shape, transformers would go on with random numbers."""
    wanted = {"config": config, "dtype": dtype, "use_safetensors": True, "quantization_config": codes}
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = _read(source, "weights", AutoModelForCausalLM, **wanted, **told)
    problems = [f"{name}: missing" for name in sorted(found["missing_keys"])]
    mismatched = [*found["mismatched_keys"], *misfits(model)]
    problems += [f"{name}: {tuple(a)} in the file, {tuple(b)} in the model" for name, a, b in mismatched]
    if problems:
        raise ModelError(f"{source}: its weights do not fit its config:\n{listing(problems)}", hint=_way_out(source))
    return model


def _source(name: str | Path) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        # Absolute: "models/llama" could be a repository's name, and a record must not be taken for one.
        return str(path.resolve())
    if path.is_absolute() or str(name).startswith((".", "~")):
        raise ModelError(f"{name}: no such folder", hint="give the folder that holds config.json")
    return str(name)


def _place(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise SpecError(f"no device {device!r} here: {_first_line(error)}", hint="auto, cpu, cuda or cuda:1") from None
    return place


def _read(source: str, part: str, reader: Any, **wanted: Any) -> Any:
    try:
        return reader.from_pretrained(source, trust_remote_code=False, **wanted)
    except Exception as error:  # on a stranger's files the readers beneath raise anything, a bare Exception too
        if "trust_remote_code" in str(error):
            reason, hint = "it needs code of its own, which is never run", "take a model that transformers itself knows"
        else:
            reason, hint = _first_line(error), _way_out(source)
        raise ModelError(f"{source}: the {part} cannot be loaded: {reason}", hint=hint) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def _way_out(source: str) -> str:
    if Path(source).is_dir():
        return "a model's folder holds config.json, the weights as .safetensors, and the tokenizer's files"
    return "give a folder that holds the model, or check the id and the connection to the hub"
