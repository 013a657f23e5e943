"""What each part of an adapter is worth: an estimate of how much the loss would change without it.

    plain        the square of its norm: inputs and outputs all count alike
    activations  the square of what it adds to its layer's output, in the mean over tokens
    fisher       ½·λ²·F: the loss along the part, in second order; F is the mean of the squared gradients by λ of single
                 documents, the empirical Fisher information (as in optimal brain damage, LeCun et al. 1990)

The first order, -λ·g, is left out.  An adapter that has learnt its documents by heart has parts without which other
documents would be better off; put last for that, those that move the loss most would be the first to go, and what a
bound has to allow for is how far single documents are moved, which is λ²·F (docs/log.md, 2026-11-26).

The estimates put the parts in an order.  What leaving them out costs is measured (`search/compression.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.adapters.lowrank import LowRank
from rankwise.data.examples import Examples
from rankwise.data.order import micro_batches
from rankwise.engine.forward import Forward
from rankwise.errors import SpecError, TrainingError, listing

Worth = Literal["plain", "activations", "fisher"]
Advance = Callable[[float], None]


def input_roots(
    forward: Forward,
    name: str,
    sites: Mapping[str, LowRank],
    examples: Examples,
    micro_tokens: int,
    advance: Advance,
) -> dict[str, Tensor]:
    """L `[R, R]` of E[(A·x)(A·x)ᵀ] = L·Lᵀ at every site, over all tokens of the documents; float64.

    Args:
        forward: holds the bank of the adapter.
        name: of it.
        sites: what it is at every site, in plain A and B.
        examples, micro_tokens: documents, and how much of them goes through at once.
        advance: is told how far it is, from 0 to 1.

    Raises:
        SpecError: sites that are not linear layers, or that no token went through; lists all.
    """
    moments: dict[str, Tensor] = {}
    rows: dict[str, int] = {}  # tokens that went through; of an expert only its own

    def watching(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        A = sites[path].A.detach()

        def watch(_: nn.Module, given: tuple[Any, ...]) -> None:
            shrunk = given[0].detach().reshape(-1, A.shape[1]).to(A.dtype) @ A.t()
            moments[path] = moments.get(path, 0) + (shrunk.t() @ shrunk).double()
            rows[path] = rows.get(path, 0) + len(shrunk)

        return watch

    flat = [path for path, factors in sites.items() if forward.bank.sites[path].kind.width_dims == 1]
    with ExitStack() as held:
        for path in flat:
            module: Any = forward.model.get_submodule(path)
            held.callback(module.register_forward_pre_hook(watching(path)).remove)
        batches = _batches(forward, examples, micro_tokens)
        for number, batch in enumerate(batches, start=1):
            forward.measure(examples, batch, [(name, len(batch))])
            advance(number / len(batches))
    if missing := sorted(sites.keys() - moments.keys()):
        raise SpecError(
            f"activations are known of linear layers that the documents go through, and these are none:\n"
            f"{listing(missing)}",
            hint="take worth fisher or plain, which need no activations",
        )
    return {path: _root(moment / max(rows.values())) for path, moment in moments.items()}


def _batches(forward: Forward, examples: Examples, micro_tokens: int) -> Sequence[np.ndarray]:
    """Documents that go through at once; one by one where they would be padded, and padding would be seen."""
    order = np.arange(len(examples))
    if forward.layout == "rows":
        return np.split(order, len(order))
    return micro_batches(order, examples.lengths(), micro_tokens)


def _root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt()


def fisher_worth(forward: Forward, name: str, examples: Examples, advance: Advance) -> dict[str, Tensor]:
    """½·λ²·F of every direction `[R]` of an adapter of form `adalora`, nats per judged item; float64.

    Each document goes through by itself, forward and backward, and only Λ is given gradients.

    Raises:
        TrainingError: gradients are not finite; names the documents.
    """
    sites = forward.bank.adapter(name).sites
    lam = {path: factors.lam for path, factors in sites.items() if factors.lam is not None}
    trained = {id(own) for own in lam.values()}
    for _, parameter in forward.bank.named_parameters(name):
        parameter.requires_grad_(id(parameter) in trained)
    squares = {path: torch.zeros(len(own), dtype=torch.float64) for path, own in lam.items()}
    bad = []
    for document in range(len(examples)):
        for own in lam.values():
            own.grad = None
        forward.learn(examples, [document], [(name, 1)], np.ones(1), tick=0)
        found = {path: own.grad.detach().cpu().double() for path, own in lam.items() if own.grad is not None}
        if not all(bool(one.isfinite().all()) for one in found.values()):
            bad.append(examples.origin(document))
            continue
        for path, one in found.items():
            squares[path] += one.square()
        advance((document + 1) / len(examples))
    for own in lam.values():
        own.grad = None
    if bad:
        raise TrainingError(
            f"the gradients of these documents are not finite:\n{listing(bad)}", hint="--dtype float32, or worth plain"
        )
    items = int(examples.supervised_counts().sum())
    return {path: 0.5 * own.detach().cpu().double().square() * squares[path] / items for path, own in lam.items()}
