"""safetensors files, read with suspicion and written so that a crash leaves the old file or the new one.

Pickled weights are never opened: a pickle can run anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from rankwise.errors import AdapterFileError, listing


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by name, in alphabetical order, all finite.

    Raises:
        AdapterFileError: there is no such file, it is cut short or damaged, or holds NaN or infinity.
    """
    if not path.exists():
        pickles = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        if pickles:
            raise AdapterFileError(
                f"{path.parent}: holds {', '.join(pickles)} but no {path.name}; pickled weights are never opened",
                hint="convert it where it was made: safetensors.torch.save_file(torch.load(f, weights_only=True), ...)",
            )
        raise AdapterFileError(f"{path}: no such file", hint="an adapter folder holds adapter_model.safetensors")
    try:
        stored = load(path.read_bytes())  # no mapping of a file that somebody may write to while it is in use
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path}: not a whole safetensors file ({path.stat().st_size:,} bytes): {error}",
            hint="copy or download it again; it was cut short or damaged",
        ) from None
    tensors = dict(sorted(stored.items()))  # a file has them by size
    broken = _broken(tensors)
    if broken:
        raise AdapterFileError(
            f"{path}: {len(broken)} of {len(tensors)} tensors are not finite:\n{listing(broken)}",
            hint="the run that wrote it diverged; use an earlier checkpoint",
        )
    return tensors


def _broken(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those with a NaN or an infinite number in them.

    Sums tell in one pass, with nothing written; where one is not finite itself, every number is looked at.
    """
    sums = [x.detach().sum(dtype=torch.float32) for x in tensors.values() if x.is_floating_point()]
    if not sums or torch.isfinite(torch.stack(sums)).all():
        return []
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes beside, flushes to the disk, renames into place, then reads back and compares every byte.

    Raises:
        AdapterFileError: a tensor is not finite, or what was read back is not what was written.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    broken = _broken(own)
    if broken:
        raise AdapterFileError(f"{path}: refusing to save numbers that are not finite:\n{listing(broken)}")
    beside = path.with_name(f".{path.name}.part")
    save_file(own, beside, metadata=dict(metadata or {}))
    settle(beside, path)
    back = load_file(path)
    wrong = [name for name in own.keys() | back.keys() if not _same(own.get(name), back.get(name))]
    if wrong:
        raise AdapterFileError(f"{path}: read back differs from what was written:\n{listing(sorted(wrong))}")


def write_text(path: Path, text: str) -> None:
    """As `write_tensors`: the old file or the whole new one."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    settle(beside, path)


def settle(beside: Path, path: Path) -> None:
    """Flushes a finished file to the disk and renames it into place."""
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.chmod(0o644)  # safetensors makes files that their owner alone can read
    beside.replace(path)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return False
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
