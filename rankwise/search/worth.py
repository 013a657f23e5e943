"""What the parts of an adapter are worth: an estimate of how much the loss would change without them.

    plain        the square of a part's norm: inputs and outputs all count alike
    activations  the square of what it adds to its layer's output, in the mean over tokens
    fisher       near ½·cᵀ·F·c for the part as a change c of its site's core: the loss in second order, with the
                 empirical Fisher information for its curvature (as in optimal brain damage, LeCun et al. 1990)

Each is the square of a singular value of the core between two roots, made here, and the parts are those of that very
product (`adapters/parts.py`): what is taken apart by one measure is put in order by the same.  F has R² × R² numbers a
site.  In its place stands E[g·gᵀ] ⊗ E[gᵀ·g] of the same trace, g the gradient of the core by one document, as in
Shampoo (Gupta, Koren and Singer 2018, arXiv:1802.09568; Morwani et al. 2024, arXiv:2406.17748).  A second pass that
counts λ²·F of every part put no order that could be told from this one (docs/log.md, 2026-11-27).

The first order of the loss is left out.  An adapter that has learnt its documents by heart has parts without which
other documents would be better off; put last for that, those that move the loss most would be the first to go, and what
a bound has to allow for is how far single documents are moved, which is the second order (docs/log.md, 2026-11-26).

The estimates put the parts in an order.  What leaving them out costs is measured (`search/compression.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.adapters.parts import Core
from rankwise.data.examples import Examples
from rankwise.data.order import micro_batches
from rankwise.engine.forward import Forward
from rankwise.errors import SpecError, TrainingError, listing

Worth = Literal["plain", "activations", "fisher"]
Advance = Callable[[float], None]

_FLOOR = 1e-6  # nothing that goes out counts for less than this much of what counts most, so that G has an inverse


def input_roots(
    forward: Forward,
    name: str,
    cores: Mapping[str, Core],
    examples: Examples,
    micro_tokens: int,
    advance: Advance,
) -> dict[str, Tensor]:
    """N `[R, R]` of E[(Vᵀ·x)(Vᵀ·x)ᵀ] = N·Nᵀ at every site, over all tokens of the documents; float64.

    Args:
        forward: holds the bank of the adapter.
        name: of it.
        cores: of its sites; V is `right`.
        examples, micro_tokens: documents, and how much of them goes through at once.
        advance: is told how far it is, from 0 to 1.

    Raises:
        SpecError: sites that are not linear layers, or that no token went through; lists all.
    """
    moments: dict[str, Tensor] = {}
    rows: dict[str, int] = {}  # tokens that went through; of an expert only its own

    def watching(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        V = cores[path].right.to(forward.model.device, torch.float32)

        def watch(_: nn.Module, given: tuple[Any, ...]) -> None:
            shrunk = given[0].detach().reshape(-1, len(V)).float() @ V
            moments[path] = moments.get(path, 0) + (shrunk.t() @ shrunk).double()
            rows[path] = rows.get(path, 0) + len(shrunk)

        return watch

    flat = [path for path in cores if forward.bank.sites[path].kind.width_dims == 1]
    with ExitStack() as held:
        for path in flat:
            module: Any = forward.model.get_submodule(path)
            held.callback(module.register_forward_pre_hook(watching(path)).remove)
        batches = _batches(forward, examples, micro_tokens)
        for number, batch in enumerate(batches, start=1):
            forward.measure(examples, batch, [(name, len(batch))])
            advance(number / len(batches))
    if missing := sorted(cores.keys() - moments.keys()):
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


def _root(moment: Tensor, floor: float = 0.0) -> Tensor:
    """A root of a second moment; no direction counts for less than `floor` of the one that counts most."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=floor * float(values[-1])).sqrt()


def fisher_roots(
    forward: Forward, name: str, cores: Mapping[str, Core], examples: Examples, advance: Advance
) -> dict[str, tuple[Tensor, Tensor]]:
    """G and N of every core whose loss depends on it; G·Gᵀ ⊗ N·Nᵀ is near half its Fisher information; float64.

    With g the gradient of C by one document, G·Gᵀ is Σ g·gᵀ over its trace, and N·Nᵀ is half of Σ gᵀ·g for each judged
    item: the squares of the singular values of Gᵀ·C·N are in nats per judged item.  Nothing that goes out counts for
    less than a millionth of what counts most there.

    Args:
        forward: holds the bank of the adapter.
        name: of one that has `Core.trainable` at every site.
        cores: of its sites.
        examples: documents; each goes through by itself, forward and backward.
        advance: is told how far it is, from 0 to 1.

    Raises:
        TrainingError: gradients are not finite; names the documents.
    """
    sites = forward.bank.adapter(name).sites
    right = {path: core.right.to(sites[path].A) for path, core in cores.items()}
    outgoing: dict[str, Tensor] = {}
    incoming: dict[str, Tensor] = {}
    for gradients in _gradients(forward, name, examples, advance):
        for path, gradient in gradients.items():
            own = (gradient.flatten(1) @ right[path]).cpu().double()
            outgoing[path] = outgoing.get(path, 0) + own @ own.t()
            incoming[path] = incoming.get(path, 0) + own.t() @ own
    items = int(examples.supervised_counts().sum())
    return {
        path: (_root(moment / moment.trace(), _FLOOR), _root(incoming[path] / (2 * items)))
        for path, moment in outgoing.items()
        if moment.any()
    }


def _gradients(forward: Forward, name: str, examples: Examples, advance: Advance) -> Iterator[dict[str, Tensor]]:
    """Of A at every site, one document after the other; none where a document goes past a site."""
    trained = {path: factors.A for path, factors in forward.bank.adapter(name).sites.items()}
    asked = {id(own) for own in trained.values()}
    for _, parameter in forward.bank.named_parameters(name):
        parameter.requires_grad_(id(parameter) in asked)
    bad = []
    for document in range(len(examples)):
        for own in trained.values():
            own.grad = None
        forward.learn(examples, [document], [(name, 1)], np.ones(1), tick=0)
        found = {path: own.grad.detach() for path, own in trained.items() if own.grad is not None}
        if all(bool(gradient.isfinite().all()) for gradient in found.values()):
            yield found
        else:
            bad.append(examples.origin(document))
        advance((document + 1) / len(examples))
    if bad:
        raise TrainingError(
            f"the gradients of these documents are not finite:\n{listing(bad)}", hint="--dtype float32, or worth plain"
        )
