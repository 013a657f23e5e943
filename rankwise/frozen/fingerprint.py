"""A base model's fingerprint: tells at once whether an adapter meets the weights it was trained on.

From every parameter, its name, shape and up to 64 of its values, evenly spread and rounded to bfloat16; what float16
holds with fewer digits than bfloat16 does counts as zero.  So a checkpoint has one fingerprint however it is loaded: on
any device, in float32 or bfloat16, in 8 or 4 bits (layers keep these values as they were before), and in float16 too
unless it is stored in float32 (rounding twice is not rounding once).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_VALUES, _SMALLEST = 64, 2.0**-16


@dataclass(frozen=True, eq=False)
class Sample:
    """What a fingerprint takes of a parameter: its shape, and bfloat16 values in main memory."""

    shape: tuple[int, ...]
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Sample:
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() // _VALUES))  # rounded up, so that the last values are seen too
        values = flat[::step].to(torch.bfloat16).cpu()
        return cls(tuple(tensor.shape), values.masked_fill(values.abs() < _SMALLEST, 0.0).contiguous())


def fingerprint(parameters: Iterable[tuple[str, Tensor | Sample]]) -> str:
    """SHA-256 over names and what they stand for, in the order of the names."""
    sha = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        sample = parameter if isinstance(parameter, Sample) else Sample.of(parameter)
        sha.update(f"{name} {sample.shape}\n".encode())
        sha.update(sample.values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
