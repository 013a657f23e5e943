"""Cross-entropy of a few rows of logits and its gradient, in one visit and in place."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.kernels.library import native, serves


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Negative log-likelihoods, float32 `[rows]`, of `targets` `[rows]` under `logits` `[rows, classes]`.

    With `weights` `[rows]` the logits are spent: on return they hold the gradient of `(weights * losses).sum()` with
    respect to themselves, `weights · (softmax - onehot)`.
    """
    targets, weights = targets.long(), None if weights is None else weights.float()
    if serves(logits) and logits.is_contiguous():
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        targets = targets.contiguous()
        weights = None if weights is None else weights.contiguous()
        if len(targets) and not (targets.min() >= 0 and targets.max() < logits.shape[1]):
            raise IndexError(f"targets {targets.min()} … {targets.max()} for {logits.shape[1]} classes")
        native().cross_entropy(  # type: ignore[union-attr]
            logits.data_ptr(),
            targets.data_ptr(),
            None if weights is None else weights.data_ptr(),
            losses.data_ptr(),
            *logits.shape,
            weights is not None,
        )
        return losses
    wide = logits.float()
    whole = wide.logsumexp(-1)
    losses = whole - wide.gather(1, targets.unsqueeze(1)).squeeze(1)
    if weights is not None:
        probabilities = (wide - whole.unsqueeze(1)).exp_()
        probabilities[torch.arange(len(targets), device=logits.device), targets] -= 1.0
        logits.copy_(probabilities.mul_(weights.unsqueeze(1)))
    return losses
