"""Which machine and which versions: part of every record."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rankwise.frozen.precision import Precision
from rankwise.kernels.library import native
from rankwise.planning.process import most_resident_bytes

_NAMED = ("rankwise", "torch", "transformers", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine_facts(device: torch.device, precision: Precision) -> dict[str, Any]:
    """What decides speed and bits: processor, threads, memory, device, number format, kernels."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "device": str(device),
        "number_format": f"{str(precision.dtype).removeprefix('torch.')}: {precision.reason}",
        "kernels": "compiled" if device.type == "cpu" and native() is not None else "plain PyTorch",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def peak_memory_bytes() -> int:
    """The highest resident size of this program so far."""
    known = most_resident_bytes()
    if known:
        return known
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes(device: torch.device) -> int:
    """Memory that a device has left; of the processor's what the system says, or half of all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return 1024 * int(found) if found is not None else (_memory_bytes() or 0) // 2


def _memory_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
