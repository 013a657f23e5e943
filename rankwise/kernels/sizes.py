"""Sizes of the kernels and of weights in codes, for whoever counts bytes without torch."""

from __future__ import annotations

from typing import Literal

Storage = Literal["dense", "int8", "nf4"]  # how a frozen linear layer's weight is held

LANES = 16  # floats in the longest vectors; compiled, a shrink is as wide as a multiple of it
BLOCK, GROUP = 64, 256  # weights that share a scale; scales that share one (arXiv:2305.14314, §3)
