"""The process itself: Python, torch, transformers and what they loaded, in bytes of resident memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Measured on 2026-11-24: Linux x86-64, Python 3.11, torch 2.13 for processors, transformers 5.23, SmolLM2's tokenizer
# loaded, less the weights; benchmarks/plan_check.py measures it again (`process_bytes` of each configuration).
ASSUMED = 490_000_000

_STATUS, _MAPPINGS, _REPORT = (Path(f"/proc/self/{name}") for name in ("statm", "smaps", "status"))


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        return int(_STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def most_resident_bytes() -> int:
    """The highest resident size since this program began; 0 where the system does not say.

    `getrusage` would count what the process was before it became this program, as large as the one that started it.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _REPORT.read_text(), re.M)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def resident_without(weights: int) -> int:
    """What is resident beside weights that were loaded into this process.

    Weights that are held as they lie on disk are mapped, and resident only as far as they have been read.

    Args:
        weights: bytes of the model's parameters.

    Returns:
        Bytes; `ASSUMED` where the system does not say.
    """
    resident = resident_bytes()
    if not resident:
        return ASSUMED
    mapped = read = 0
    for size, rss in re.findall(r"\.safetensors\nSize: +(\d+) kB(?:\n.*?)*?\nRss: +(\d+) kB", _MAPPINGS.read_text()):
        mapped, read = mapped + 1024 * int(size), read + 1024 * int(rss)
    return resident - read - max(0, weights - mapped)
