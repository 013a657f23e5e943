"""AdaLoRA's allocator: which directions of an adapter take part, from step to step, down to a budget.

arXiv:2303.10512.  Importance is taken from a step's gradient before that step changes anything, so that weight and
gradient belong together; the gradient is that of the task's loss alone, before clipping.

Shape letters: R directions of a site, n numbers of one of them in a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank
from rankwise.engine.run import Pruning
from rankwise.errors import SpecError

PARTS = (("A", 0), ("B", 1), ("lam", 0))  # tensors, and the dimension along which their directions lie


class Allocator:
    """Of one adapter in training.

    Args:
        name: the adapter's, for messages.
        sites: its factors by path, of form `adalora`.
        pruning: how it comes down.
        steps: of the whole run; the schedule follows from their number.

    Attributes:
        settled: the allocation is final, and what was left out is gone.

    Raises:
        SpecError: the ranks at the end are not below those at the start.
    """

    def __init__(self, name: str, sites: Mapping[str, LowRank], pruning: Pruning, steps: int) -> None:
        self.sites, self.pruning, self.settled = dict(sites), pruning, False
        self.start = sum(factors.rank for factors in sites.values())
        mean = self.start / len(sites)
        target = max(1, int(2 / 3 * mean)) if pruning.target_rank is None else pruning.target_rank
        self.target = target * len(sites)
        if self.target >= self.start:
            raise SpecError(
                f"{name!r}: form adalora begins with rank {mean:g} a site and is to end with {target}",
                hint="a higher rank at the start (about 1.5 × the rank at the end), or a lower target_rank",
            )
        self._begins = round(pruning.begin * steps)
        self._settles = max(1, steps - round(pruning.settle * steps))
        # Importance smoothed, and its smoothed uncertainty: equations 9 and 10, `[R, n]` each.
        self.sizes = {f"{path}.{part}": torch.zeros_like(rows) for path, part, rows in self._rows()}
        self.doubts = {name: torch.zeros_like(size) for name, size in self.sizes.items()}

    def _rows(self) -> Iterator[tuple[str, str, Tensor]]:
        for path, factors in self.sites.items():
            for part, dim in PARTS:
                yield path, part, by_direction(factors.get_parameter(part), dim)

    # ── the schedule ─────────────────────────────────────────────────────────────────────────────────────────────

    def budget(self, step: int) -> int:
        """Directions after a step, from 1: equation 12."""
        if step >= self._settles:
            return self.target
        if step <= self._begins:
            return self.start
        left = 1 - (step - self._begins) / (self._settles - self._begins)
        return self.target + int((self.start - self.target) * left**3)

    def due(self, step: int) -> bool:
        """Whether the allocation made after a step is the final one; a step that was passed over is made up for."""
        return not self.settled and step >= self._settles

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def observe(self) -> None:
        """Takes in the task's gradient.  Of directions that are left out, what was last known of them stays."""
        if self.settled:
            return
        memory = self.pruning.memory
        for path, part, rows in self._rows():
            factors, dim = self.sites[path], dict(PARTS)[part]
            grad = factors.get_parameter(part).grad
            if grad is None or factors.empty:
                continue
            size, doubt = self.sizes[f"{path}.{part}"], self.doubts[f"{path}.{part}"]
            importance = _of(factors.kept, rows * by_direction(grad, dim)).abs_()  # equation 8
            own_size = _of(factors.kept, size).lerp(importance, 1 - memory)
            own_doubt = _of(factors.kept, doubt).lerp((importance - own_size).abs_(), 1 - memory)
            for whole, own in ((size, own_size), (doubt, own_doubt)):
                if factors.kept is None:
                    whole.copy_(own)
                else:
                    whole.index_copy_(0, factors.kept, own)

    @torch.no_grad()
    def straighten(self) -> float:
        """Adds the orthogonality term's gradient, 4γ·(XXᵀ - 1)·X by rows X, to those that have gathered; its value."""
        total = 0.0
        for path, part, rows in self._rows():
            factors, dim = self.sites[path], dict(PARTS)[part]
            grad = factors.get_parameter(part).grad
            if part == "lam" or grad is None or factors.empty:
                continue
            own = _of(factors.kept, rows)
            apart = own @ own.t()
            apart.diagonal().sub_(1)
            total += float(apart.square().sum())
            slope = (apart @ own).mul_(4 * self.pruning.orthogonality)
            if factors.kept is None:
                by_direction(grad, dim).add_(slope)
            else:
                by_direction(grad, dim).index_add_(0, factors.kept, slope)
        return self.pruning.orthogonality * total

    @torch.no_grad()
    def allocate(self, step: int) -> bool:
        """After an optimiser step, from 1; whether anything was allocated."""
        falling = step > self._begins and step % self.pruning.every == 0
        if self.settled or not (falling or self.due(step)):
            return False
        scores = [self._scores(path) for path in self.sites]
        order = torch.cat(scores).argsort(descending=True, stable=True)
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order[: self.budget(step)]] = True
        for factors, mask in zip(self.sites.values(), chosen.split([len(score) for score in scores]), strict=True):
            factors.leave_out_all_but(mask.nonzero().flatten())
            factors.get_parameter("lam")[~mask] = 0
        return True

    def _scores(self, path: str) -> Tensor:
        """Of each direction, `[R]`: equation 7, of each tensor the mean of importance times uncertainty (11)."""
        of_parts = [self.sizes[f"{path}.{part}"] * self.doubts[f"{path}.{part}"] for part, _ in PARTS]
        return torch.stack([product.mean(1) for product in of_parts]).sum(0)

    def settle(self) -> None:
        """What is left out is removed; nothing is observed from here on."""
        for factors in self.sites.values():
            factors.remove_what_is_left_out()
        self.sizes, self.doubts, self.settled = {}, {}, True

    @property
    def ranks(self) -> dict[str, int]:
        """Directions that take part, by site."""
        return {path: f.rank if f.kept is None else len(f.kept) for path, f in self.sites.items()}

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────

    def tensors(self) -> dict[str, Tensor]:
        sizes = {f"size/{name}": tensor for name, tensor in self.sizes.items()}
        return sizes | {f"doubt/{name}": tensor for name, tensor in self.doubts.items()}

    def numbers(self) -> dict[str, Any]:
        kept = {path: None if f.kept is None else f.kept.tolist() for path, f in self.sites.items()}
        return {"settled": self.settled, "kept": kept}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """The inverse of `tensors` and `numbers`, for factors whose tensors have been restored."""
        self.settled = numbers["settled"]
        self.sizes, self.doubts = (
            {name: t.to(self.sites[name.rpartition(".")[0]].A.device) for name, t in _under(kind, tensors)}
            for kind in ("size", "doubt")
        )
        for path, kept in numbers["kept"].items():
            if kept is not None:
                self.sites[path].leave_out_all_but(torch.tensor(kept, dtype=torch.int64))


def by_direction(tensor: Tensor, dim: int) -> Tensor:
    """A view `[R, n]` of a tensor whose directions lie along `dim`."""
    whole = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor.flatten(1)
    return whole if dim == 0 else whole.t()


def _of(kept: Tensor | None, rows: Tensor) -> Tensor:
    return rows if kept is None else rows.index_select(0, kept)


def _under(kind: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((key.removeprefix(f"{kind}/"), tensor) for key, tensor in tensors.items() if key.startswith(f"{kind}/"))
