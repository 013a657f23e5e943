"""What a plan is asked for, and what is chosen where nothing was said: each choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rankwise.adapters.spec import Blocks, RankPattern, named_targets, readable_exclusions, readable_targets
from rankwise.kernels.sizes import Storage
from rankwise.planning.passes import Form
from rankwise.settings import Settings

Method = Literal["full", "lora", "dora", "adalora", "qlora"]
METHODS: dict[Method, tuple[Form, Storage]] = {
    "full": ("full", "dense"),
    "lora": ("lora", "dense"),
    "dora": ("dora", "dense"),
    "adalora": ("adalora", "dense"),
    "qlora": ("lora", "nf4"),
}
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}

_CPU, _GPU = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/version")


class PlanRequest(Settings):
    """A configuration whose memory is asked for.  Fields are the long options of `rankwise plan`.

    Raises:
        SpecError: lists every unknown name and impossible value.
    """

    method: Method = "lora"
    storage: Storage | None = None
    rank: int = Field(default=16, ge=1)
    targets: Annotated[str | tuple[str, ...], BeforeValidator(named_targets), AfterValidator(readable_targets)] = (
        "all-linear"
    )
    exclude: Annotated[str | tuple[str, ...], BeforeValidator(named_targets), AfterValidator(readable_exclusions)] = ()
    layers: Blocks = ""
    rank_pattern: RankPattern = Field(default_factory=dict)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    batch_tokens: int = Field(default=4096, ge=1)
    micro_tokens: int = Field(default=0, ge=0)
    document_tokens: int = Field(default=512, ge=1)
    supervised: float = Field(default=1.0, gt=0, le=1)
    context: int = Field(default=2048, ge=1)
    checkpointing: bool = False
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "compiled", "plain"] = "auto"

    @model_validator(mode="after")
    def _makes_sense(self) -> PlanRequest:
        if self.form == "full" and self.held_as != "dense":
            raise ValueError("weights in 8 or 4 bits are not trained themselves; leave out storage, or take qlora")
        return self

    @property
    def form(self) -> Form:
        return METHODS[self.method][0]

    @property
    def held_as(self) -> Storage:
        return self.storage or METHODS[self.method][1]


@dataclass(frozen=True)
class Machine:
    """What a request comes down to on a machine: `cpu` or `cuda`, a number format, the kernels; `reasons` for each."""

    device: str
    dtype: str
    compiled: bool
    reasons: tuple[str, ...]

    @property
    def width(self) -> int:
        return WIDTHS[self.dtype]


def machine_for(request: PlanRequest) -> Machine:
    """Looks at the processor and for a GPU's driver; nothing is started."""
    reasons = []
    device = request.device
    if device == "auto":
        device = "cuda" if _GPU.exists() else "cpu"
        reasons.append(
            f"device {device}: " + ("an NVIDIA driver is here" if device == "cuda" else "no NVIDIA driver here")
        )
    fast = device == "cuda" or _multiplies_bfloat16()
    dtype = request.dtype
    if dtype == "auto":
        dtype = "bfloat16" if fast else "float32"
        reasons.append(f"{dtype}: " + ("it is multiplied fast there" if fast else "no fast bfloat16 on this processor"))
    compiled = device == "cpu" and dtype == "bfloat16" and fast
    if request.kernels != "auto":
        compiled = request.kernels == "compiled"
    return Machine(device, dtype, compiled, tuple(reasons))


def _multiplies_bfloat16() -> bool:
    """The processor's own list of what it can do: as `frozen/precision.py`, which asks torch."""
    try:
        flags = next((line for line in _CPU.read_text(errors="replace").splitlines() if line.startswith("flags")), "")
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_tile"} & set(flags.split()))
