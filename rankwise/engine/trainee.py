"""One adapter in training, or the base: its parameters, its optimiser, its guard.  Nothing is shared between two."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.engine.moments import read_moments
from rankwise.engine.nested import Lesson, Nested
from rankwise.engine.pruning import PARTS, Allocator
from rankwise.engine.rates import rates
from rankwise.engine.run import Run
from rankwise.engine.weights import Weights
from rankwise.errors import SpecError
from rankwise.formats.record import WHOLE
from rankwise.surgery.bank import Bank

_WINDOW = 10  # steps whose mean loss is compared with the first one's


def check_can_learn(bank: Bank) -> None:
    """That gradients mean something in a bank's model.

    Raises:
        SpecError: it is in float16.
    """
    if getattr(bank.model, "dtype", None) == torch.float16:
        # Without loss scaling, of which there is none here, nearly all gradients of a step round to 0.
        raise SpecError(
            "a model in float16 is not trained: most of its gradients are too small for that format",
            hint="load it in bfloat16 or float32; evaluating in float16 is allowed",
        )


@dataclass
class Guard:
    """Watches the losses: counts steps that were not finite, and says when a run has gone wrong for good.

    A run has diverged when its loss, averaged over ten steps, stands half again above where it began plus 0.5 nats:
    a fresh adapter begins at the base's loss, so by then training has made the model plainly worse.
    """

    skipped: int = 0
    in_a_row: int = 0
    first: float | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def skip(self) -> None:
        self.skipped += 1
        self.in_a_row += 1

    def take(self, loss: float) -> None:
        self.in_a_row = 0
        self.first = loss if self.first is None else self.first
        self.recent.append(loss)

    @property
    def diverged(self) -> bool:
        if self.first is None or len(self.recent) < _WINDOW:
            return False
        return sum(self.recent) / _WINDOW > 1.5 * self.first + 0.5

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "first": self.first, "recent": list(self.recent)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Guard:
        return cls(state["skipped"], state["in_a_row"], state["first"], deque(state["recent"], maxlen=_WINDOW))


class Trainee:
    """An adapter of a bank, or its base (None), with what it takes to train it.

    Attributes:
        parameters: by name, as the bank names them; of the base the masters, as its model names them.
        weights: of the base, else None.
        guard: what went wrong so far.
        allocator: of form `adalora`, else None.
        nested: of an adapter whose every prefix learns, else None.
        best: the parameters where validation was best, and `best_loss`, `best_step`; None before the first.
    """

    def __init__(self, bank: Bank, name: str | None, run: Run, steps: int, seed: int = 0) -> None:
        self.bank, self.name, self.run = bank, name, run
        self.weights = Weights(bank.model) if name is None else None
        self.parameters: dict[str, nn.Parameter] = (
            self.weights.masters if self.weights is not None else dict(bank.named_parameters(str(name)))
        )
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None  # one that stays so was never reached
        self.nested = Nested(bank, str(name), seed) if run.nested else None
        if name is not None:
            bank.nest(name, self.nested.ranks if self.nested is not None else ())
        self.rates = rates(bank, name, run)
        self.optimiser = torch.optim.AdamW(
            [{"params": [self.parameters[n] for n in r.names], "weight_decay": r.weight_decay} for r in self.rates],
            lr=run.lr,
            betas=run.betas,
            eps=run.eps,
            fused=True,
        )
        if run.moments is not None:
            for (path, part), tensor in read_moments(run.moments, self.parameters).items():
                self._take_up(path, part, tensor)
        self.guard = Guard()
        sites = {} if name is None else bank.adapter(name).sites
        triplets = {path: factors for path, factors in sites.items() if factors.lam is not None}
        self.allocator = Allocator(str(name), triplets, run.pruning, steps) if triplets else None
        self.best: dict[str, Tensor] | None = None
        self.best_loss, self.best_step = float("inf"), 0
        self.stale = 0
        self.crooked = 0.0  # of form `adalora`, the orthogonality term of the last step

    def lessons(self, step: int, documents: np.ndarray) -> list[Lesson]:
        """How the documents of a step, from 0, are learnt."""
        return [Lesson(self.name, documents)] if self.nested is None else self.nested.lessons(step, documents)

    def step(self, lr: float) -> float | None:
        """Clips and applies the gradients that have gathered; the norm before clipping, or None if not finite."""
        parameters = list(self.parameters.values())
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        finite = math.isfinite(norm)
        if finite:
            if self.allocator is not None:
                self.allocator.observe()
            nn.utils.clip_grads_with_norm_(parameters, self.run.clip, norm)
            if self.allocator is not None:
                self.crooked = self.allocator.straighten()
            for group, own in zip(self.optimiser.param_groups, self.rates, strict=True):
                group["lr"] = lr * own.factor
            self.optimiser.step()
            self._settle()
        self.forget()
        return float(norm) if finite else None

    def prune(self, step: int) -> None:
        """After a step, from 1, of form `adalora`: the budget is allocated anew when it is time.

        What is left out stays where it is.  When the allocation is final it is removed, and earlier weights, of a
        larger adapter, are no candidates for the best any more.
        """
        if self.allocator is None or not self.allocator.allocate(step):
            return
        for path, factors in self.allocator.sites.items():
            if factors.kept is not None:
                for part, dim in PARTS:
                    self._still(self.parameters[f"{path}.{part}"], dim, factors.kept, remove=self.allocator.due(step))
        if self.allocator.due(step):
            self.allocator.settle()
            self.best, self.best_loss, self.best_step, self.stale = None, float("inf"), 0, 0

    def _still(self, parameter: nn.Parameter, dim: int, kept: Tensor, *, remove: bool) -> None:
        """The optimiser's moments of what is left out, set to 0 or removed."""
        moments = self.optimiser.state[parameter]
        for name in [name for name, moment in moments.items() if moment.dim()]:
            own = moments[name].index_select(dim, kept)
            moments[name] = own if remove else torch.zeros_like(moments[name]).index_copy_(dim, kept, own)

    def pruned(self) -> dict[str, float]:
        """Of form `adalora`, what a step's event says of it."""
        if self.allocator is None:
            return {}
        return {"directions": sum(self.allocator.ranks.values()), "orthogonality": self.crooked}

    @property
    def unreached(self) -> list[str]:
        """Parameters that no micro-batch has given a gradient, not even one of 0.

        Experts are left out: which of them are asked depends on the tokens, and a rare one may be asked later.  So are
        sites that have lost all their directions.
        """
        pruned = {path for path, rank in self.allocator.ranks.items() if not rank} if self.allocator is not None else ()
        return [
            name
            for name, parameter in self.parameters.items()
            if parameter.grad is None and "experts" not in name.split(".") and name.rpartition(".")[0] not in pruned
        ]

    def forget(self) -> None:
        """Sets the gradients to 0; one that never came stays None."""
        self.optimiser.zero_grad(set_to_none=False)

    def judge(self, loss: float, step: int) -> bool:
        """Takes in a validation loss; True if it is the best so far of what may be kept."""
        if self.allocator is not None and not self.allocator.settled:
            return False
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.stale = loss, step, 0
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            return True
        self.stale += 1
        return False

    @torch.no_grad()
    def restore_best(self) -> None:
        for name, tensor in (self.best or {}).items():
            self.parameters[name].copy_(tensor)
        self._settle()

    def retire(self) -> None:
        """It learns no more: it is at its best, and what only learning needs is let go of."""
        self.restore_best()
        self.optimiser.state.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _settle(self) -> None:
        if self.weights is not None:
            self.weights.settle()

    def close(self) -> None:
        """Of the base: its weights are a model's again, and another's than the bank knew."""
        if self.weights is not None:
            self.weights.close()
            self.bank.renew()

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        run = self.run.model_dump(mode="json")
        if self.name is None:
            return {"spec": {"form": WHOLE}, "run": run}
        adapter = self.bank.adapter(self.name)
        return {"spec": adapter.spec.model_dump(mode="json"), "start": adapter.start_digest(), "run": run}

    def tensors(self) -> dict[str, Tensor]:
        """All that must be kept to go on, beside the numbers of `numbers`."""
        kept = {f"parameter/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        kept |= {f"best/{name}": tensor for name, tensor in (self.best or {}).items()}
        for name, parameter in self.parameters.items():
            for part, tensor in self.optimiser.state.get(parameter, {}).items():
                kept[f"optimiser.{part}/{name}"] = tensor
        return kept | (self.allocator.tensors() if self.allocator is not None else {})

    def numbers(self) -> dict[str, Any]:
        best = {"loss": self.best_loss, "step": self.best_step, "stale": self.stale} if self.best else None
        pruning = None if self.allocator is None else self.allocator.numbers()
        return {"guard": self.guard.state(), "best": best, "pruning": pruning}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of `tensors` and `numbers`."""
        best: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensor = tensors[f"parameter/{name}"]
            # Pruned, it is smaller than it began; else it lies in memory as it did, for the bits.
            like = parameter if parameter.shape == tensor.shape else tensor
            parameter.data = torch.empty_like(like, device=parameter.device).copy_(tensor)
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "best":
                best[name] = tensor.to(self.parameters[name].device)
            elif kind.startswith("optimiser."):
                self._take_up(name, kind.removeprefix("optimiser."), tensor)
        self._settle()
        for stepped in self.optimiser.state:
            stepped.grad = torch.zeros_like(stepped)  # as after any step: a gradient of 0 is a step, none is not
        if self.allocator is not None:
            self.allocator.restore(tensors, numbers["pruning"])
        self.guard = Guard.of(numbers["guard"])
        if numbers["best"] is not None:
            self.best = best
            self.best_loss, self.best_step = numbers["best"]["loss"], numbers["best"]["step"]
            self.stale = numbers["best"]["stale"]

    def _take_up(self, name: str, part: str, tensor: Tensor) -> None:
        """A part of the optimiser's state; laid out as the parameter, as fused optimisers go by the memory's order."""
        parameter = self.parameters[name]
        own = tensor if tensor.dim() == 0 else torch.empty_like(parameter.detach()).copy_(tensor)
        self.optimiser.state[parameter][part] = own
