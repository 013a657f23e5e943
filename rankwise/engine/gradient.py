"""The leading singular vectors of G = dL/dW at every site, without ever making G (init `lora_ga`).

Beside W stands a probe, an adapter with scale 1.  While its B is zero, nothing changes and the gradient of B is G·Aᵀ;
while its A is zero, the gradient of A is Bᵀ·G.  So two passes over the documents are one round of subspace iteration
(Halko et al. 2011, arXiv:0909.4061), on any kind of layer, in any storage, in the memory of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rankwise.adapters.directions import orthonormal, triplets_within
from rankwise.data.corpus import Corpus
from rankwise.engine.forward import Forward
from rankwise.errors import TrainingError, listing

ROUNDS = 2


def gradient_triplets(
    forward: Forward, probe: str, corpus: Corpus, batches: Sequence[np.ndarray], advance: Callable[[float], None]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Left singular vectors `[O, Q]` of G, its values `[Q]` and right vectors `[Q, I]`, the largest first.

    At every site that a gradient reaches.

    Args:
        forward: holds the bank of the probe.
        probe: the adapter, whose As `[Q, I, *K]` are where the search begins and whose Bs are zero.  Both are changed.
        corpus, batches: documents, and which of them go through the model at once; L is the mean over their
            supervised tokens.
        advance: is told how far it is, from 0 to 1.

    Raises:
        TrainingError: gradients are not finite; names the sites.
    """
    gradient = _Gradient(forward, probe, corpus, batches, advance)
    rights = {path: factors.A.detach().flatten(1).clone() for path, factors in gradient.sites.items()}
    lefts: dict[str, Tensor] = {}
    for _ in range(ROUNDS):
        lefts = {path: orthonormal(found) for path, found in gradient.times(rights).items()}
        onto = gradient.onto(lefts)
        rights = {path: orthonormal(found.t()).t() for path, found in onto.items()}
    return {path: triplets_within(lefts[path], found) for path, found in onto.items()}


class _Gradient:
    """G at every site, known by its products."""

    def __init__(
        self,
        forward: Forward,
        probe: str,
        corpus: Corpus,
        batches: Sequence[np.ndarray],
        advance: Callable[[float], None],
    ) -> None:
        self.forward, self.probe, self.corpus, self.batches, self.advance = forward, probe, corpus, batches, advance
        self.sites = forward.bank.adapter(probe).sites
        self.weight = 1.0 / corpus.supervised_counts()[np.concatenate(batches)].sum()
        self.passes = 0

    def times(self, rights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G·Vᵀ `[O, Q]` for rows V `[Q, I]`."""
        return self._gradients_of("B", {path: (right, None) for path, right in rights.items()})

    def onto(self, lefts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Uᵀ·G `[Q, I]` for columns U `[O, Q]`."""
        return self._gradients_of("A", {path: (None, left) for path, left in lefts.items()})

    def _gradients_of(self, part: str, values: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> dict[str, Tensor]:
        for path, factors in self.sites.items():
            for own, value in zip((factors.A, factors.B), values.get(path, (None, None)), strict=True):
                own.requires_grad_(own is getattr(factors, part)).grad = None
                with torch.no_grad():
                    own.zero_() if value is None else own.copy_(value.view(own.shape))
        for batch in self.batches:
            weights = np.full(len(batch), self.weight)
            self.forward.learn(self.corpus, batch, [(self.probe, len(batch))], weights, tick=0)
            self.passes += 1
            self.advance(self.passes / (2 * ROUNDS * len(self.batches)))
        grads = {path: getattr(factors, part).grad for path, factors in self.sites.items()}
        found = {path: grad.flatten(1) for path, grad in grads.items() if grad is not None}
        bad = [path for path, grad in found.items() if not grad.isfinite().all()]
        if bad:
            raise TrainingError(
                f"the gradients with which init 'lora_ga' begins are not finite at {len(bad)} layers:\n{listing(bad)}",
                hint="another number format (dtype), or another init",
            )
        return found
