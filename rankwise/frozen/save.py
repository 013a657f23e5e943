"""A model whose weights have become others, written as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rankwise.errors import ModelError, RunFolderError, listing


def save_base(model: Any, reader: Any, folder: Path) -> None:
    """Writes config, weights as safetensors in the number format in which they are held, and `reader`.

    `reader` is the tokenizer, or where pictures are read the image processor.  A crash leaves half a model: whoever
    writes it says afterwards that it is whole.

    Raises:
        ModelError: a weight is not finite.
        RunFolderError: the folder cannot be written.
    """
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise ModelError(f"{folder}: refusing to save numbers that are not finite:\n{listing(broken)}")
    try:
        model.save_pretrained(folder)
        reader.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors makes files that their owner alone can read
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise RunFolderError(
            f"{folder}: the model cannot be written: {error}", hint="make room, then --resume"
        ) from None
