"""Dropout masks that depend on nothing but the adapter's seed, the site and the tick of the forward pass.

Seeded so, a document's mask is the same whatever else is in the stream, in the recomputation of a checkpointed layer,
and after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mixed(*parts: int) -> int:
    """A 63-bit seed from several integers (SplitMix64's finaliser over a running sum; Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def keep_mask(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> Tensor:
    """True with probability 1 - dropout, which is rounded to a multiple of 2⁻¹⁶: four elements a random word."""
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64, device=device)
    draws = words.random_(-(2**63), None, generator=generator).view(torch.int16)
    return draws[: shape.numel()].view(shape) >= round(dropout * 2**16) - 2**15
