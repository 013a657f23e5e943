"""How much goes through the model at once, by device: the engine works by these numbers, plans count with them."""

from __future__ import annotations

MICRO_TOKENS = {"cpu": 2048, "cuda": 8192}

# Logits of one chunk.  On a CPU they stay below glibc's limit for blocks of their own (kernels/library.py).
CHUNK_BYTES = {"cpu": 30 * 2**20, "cuda": 256 * 2**20}
LEAST_CHUNK = 16  # rows, however large the vocabulary
