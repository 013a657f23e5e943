"""Dropout masks, one for each run of rows of an adapter, from torch's own generator for the device.

The generator is seeded by the adapter's seed, the site and the tick of the forward pass, so a mask is the same in the
recomputation of a checkpointed layer and after a resume.  An element's place in its run counts too: a document's mask
depends on the documents of the same adapter before it and on how a step was cut into passes, but not on what follows
or on the runs of other adapters between.  Runs of one adapter that are not neighbours begin with the same mask.
Another kind of device draws other masks.
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
