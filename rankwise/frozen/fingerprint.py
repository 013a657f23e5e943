"""A base model's fingerprint: tells at once whether an adapter meets the weights it was trained on.

From every parameter, its name, shape and up to 64 of its values, evenly spread and rounded to bfloat16, so that a
checkpoint has one fingerprint however it is loaded: in float32, bfloat16 or on any device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_VALUES = 64


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over `(name, tensor)` pairs, in the order of their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda pair: pair[0]):
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() // _VALUES))  # rounded up, so that the last values are seen too
        values = flat[::step].to(torch.bfloat16).cpu()
        sha.update(f"{name} {tuple(tensor.shape)}\n".encode())
        sha.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
