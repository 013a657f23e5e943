"""Which number format the base is held in, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankwise.errors import SpecError

_NAMED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    reason: str


def choose_precision(device: torch.device, wanted: str = "auto") -> Precision:
    """bfloat16 where the device multiplies it fast, float32 elsewhere; or what was asked for."""
    if wanted != "auto":
        if wanted not in _NAMED:
            raise SpecError(f"no number format {wanted!r}", hint=f"auto, {', '.join(_NAMED)}")
        return Precision(_NAMED[wanted], "asked for")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (
            Precision(torch.bfloat16, "the GPU has it") if fast else Precision(torch.float32, "the GPU has no bfloat16")
        )
    if device.type == "cpu" and cpu_has_bfloat16():
        return Precision(torch.bfloat16, "the CPU multiplies it natively")
    return Precision(torch.float32, f"no fast bfloat16 on this {device.type.upper()}")


def cpu_has_bfloat16() -> bool:
    """Whether the processor has bfloat16 products (AVX512-BF16 or AMX), as torch reports it.

    The two questions are private functions of torch, alike since 2.6; a torch without them counts as a no.
    """
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)
