"""The grid on which the laws of docs/design.md hold.  A new form, scaling, storage or start is one entry here."""

from __future__ import annotations

import hashlib
from itertools import product
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from rankwise.adapters.spec import LoraSpec
from rankwise.surgery.bank import Bank

FORMS = ("lora", "dora", "adalora")
SCALINGS = ("alpha/r", "alpha/sqrt(r)", "alpha")
STORAGES = ("dense", "int8", "nf4")
STARTS = ("kaiming", "gaussian")
RESIDUAL_STARTS = ("pissa", "olora")
RESIDUAL_FORMS = ("lora", "dora")  # the others have a start of their own
DATA_STARTS = ("eva", "lora_ga")  # found in documents, by rankwise.begin
CODE_STARTS = ("loftq",)  # out of what holding a weight in codes took away
DTYPES = (torch.float32, torch.bfloat16)


class Cell(NamedTuple):
    """One choice of each axis, and a start."""

    form: str
    scaling: str
    storage: str
    start: str

    @property
    def name(self) -> str:
        return " ".join(self).replace(" ", "-")

    @property
    def refused(self) -> bool:
        """Whether it is an error, and no law is left to hold."""
        if self.form not in RESIDUAL_FORMS and self.start not in STARTS:
            return True
        return self.start in CODE_STARTS and self.storage == "dense"


EVERY_START = (*STARTS, *RESIDUAL_STARTS, *DATA_STARTS, *CODE_STARTS)
EVERY_CELL = [Cell(*choice) for choice in product(FORMS, SCALINGS, STORAGES, EVERY_START)]
CELLS = [cell for cell in EVERY_CELL if not cell.refused]


def spec(targets: tuple[str, ...] | str = "all-linear", **settings: object) -> LoraSpec:
    return LoraSpec(**{"rank": 3, "alpha": 6, "targets": targets, **settings})


def trained(bank: Bank, name: str, chosen: LoraSpec, seed: int = 0, size: float = 0.3) -> None:
    """Adds an adapter whose every tensor has been moved away from its start."""
    bank.add(name, chosen, seed)
    moved(bank, name, seed, size)


def moved(bank: Bank, name: str, seed: int = 0, size: float = 0.3) -> None:
    """Moves an adapter's every tensor away from where it is."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for _, parameter in bank.named_parameters(name):
            parameter += size * torch.randn(parameter.shape, generator=generator)


def state_of(model: nn.Module) -> tuple[object, ...]:
    """All of a model that undoing must bring back: bytes, names, module identities, ties, flags, known tokens."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    modules = tuple((path, id(module)) for path, module in model.named_modules(remove_duplicate=False))
    parameters = tuple((path, id(p), p.requires_grad) for path, p in model.named_parameters(remove_duplicate=False))
    config = getattr(model, "config", None)
    config = config.get_text_config() if isinstance(config, PreTrainedConfig) else None
    said = [getattr(one, "vocab_size", None) for one in (model, config)]
    return sha.hexdigest(), modules, parameters, said


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
