"""A base model's fingerprint: tells at once whether an adapter meets the weights it was trained on.

From every parameter, its name, shape and up to 64 of its values, evenly spread and rounded to bfloat16; what float16
holds with fewer digits than bfloat16 does counts as zero.  So a checkpoint has one fingerprint however it is loaded: on
any device, in float32 or bfloat16, and in float16 too unless it is stored in float32 (rounding twice is not rounding
once).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_VALUES, _SMALLEST = 64, 2.0**-16


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over `(name, tensor)` pairs, in the order of their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda pair: pair[0]):
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() // _VALUES))  # rounded up, so that the last values are seen too
        values = flat[::step].to(torch.bfloat16).cpu()
        values = values.masked_fill(values.abs() < _SMALLEST, 0.0)
        sha.update(f"{name} {tuple(tensor.shape)}\n".encode())
        sha.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
