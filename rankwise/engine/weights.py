"""The base's own weights in training: what the optimiser steps, and what the model multiplies with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from rankwise.engine.run import Run
from rankwise.errors import SpecError
from rankwise.formats.record import WHOLE
from rankwise.surgery.bank import Bank


def label(name: str | None) -> str:
    """An adapter's name as it is, and what the base is called in events and checkpoints where it is trained."""
    return WHOLE if name is None else name


def check_trained_alone(bank: Bank, names: Sequence[str | None], run: Run) -> None:
    """That a bank's base can be trained itself.

    Raises:
        SpecError: adapters are held or trained beside it, it is held in codes, it is frozen, or the run has LoRA+'s
            rates.
    """
    if bank.names or len(names) > 1:
        raise SpecError(
            "the base is trained by itself: every adapter beside it would be one of another base after each step",
            hint="train adapters and the base one after the other, each in a bank of its own",
        )
    if bank.storage != "dense":
        raise SpecError(
            f"a base held in {bank.storage} is not trained itself: its weights are codes",
            hint="load it dense, or train an adapter on it",
        )
    if run.lr_ratio != 1.0:
        raise SpecError("lr_ratio is of the factors A and B, and the base has none", hint="leave lr_ratio at 1")
    if not any(parameter.requires_grad for parameter in bank.model.parameters()):
        raise SpecError("every weight of the model is frozen", hint="model.requires_grad_(True) first")


class Weights:
    """A base whose weights are trained, those that its model does not hold fixed itself.

    A step in bfloat16 would be lost where it is smaller than a 256th of the weight, as most are.  So such a weight has
    a float32 master, which gathers the gradients and is stepped, and is rounded into the weight afterwards; the
    weight's own gradient is freed as soon as it is added there.  Wider weights are their own masters.

    Attributes:
        masters: by the names of the model's parameters; weights that are shared are there once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.masters: dict[str, nn.Parameter] = {}
        self._hooks = []
        for name, weight in self._weights.items():
            weight.grad = None
            self.masters[name] = weight
            if weight.dtype == torch.bfloat16:
                self.masters[name] = master = nn.Parameter(weight.detach().float())
                self._hooks.append(weight.register_post_accumulate_grad_hook(partial(_gather, master)))

    @torch.no_grad()
    def settle(self) -> None:
        """The model multiplies with what the masters are now."""
        for name, weight in self._weights.items():
            if self.masters[name] is not weight:
                weight.copy_(self.masters[name])

    def close(self) -> None:
        """Masters and gradients are let go of; the weights stay as they have become."""
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights.values():
            weight.grad = None


def _gather(master: nn.Parameter, weight: Tensor) -> None:
    if weight.grad is None:
        return
    if master.grad is None:
        master.grad = torch.zeros_like(master)  # laid out as the master, for torch's fused optimisers
    master.grad.add_(weight.grad)
    weight.grad = None


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within it nothing of a model is trained, so that documents go through it as through any frozen base."""
    opened = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in opened:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in opened:
            parameter.requires_grad_(True)
