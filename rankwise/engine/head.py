"""From hidden states to losses, on supervised tokens only and in chunks: the logits of a batch never exist at once.

Shape letters: S supervised tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankwise.kernels.loss import cross_entropy
from rankwise.planning.limits import CHUNK_BYTES, LEAST_CHUNK


@dataclass(frozen=True)
class Shaping:
    """What some families do to logits: divide or multiply (Granite, Cohere), then cap smoothly (Gemma 2)."""

    factor: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(cls, config: Any) -> Shaping:
        divisor = getattr(config, "logits_scaling", None)
        factor = getattr(config, "logit_scale", None)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(factor or (1 / divisor if divisor else 1.0), cap or 0.0)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.factor != 1.0:
            logits = logits * self.factor
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def slope(self, shaped: Tensor) -> Tensor | float:
        """D shaped / d logits, from the shaped logits."""
        return self.factor * (1 - (shaped / self.softcap).square()) if self.softcap else self.factor


def chunk_rows(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    limit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(LEAST_CHUNK, limit // (classes * dtype.itemsize))


def frozen_head_loss(
    hidden: Tensor, head: nn.Linear, shaping: Shaping, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses through a frozen head, and the losses themselves, float32 `[S]`.

    The gradient with respect to `hidden` `[S, H]` is made on the way forward, chunk by chunk; nothing else is kept.
    """
    return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, shaping, targets, weights)


@torch.no_grad()
def measured_losses(hidden: Tensor, logits_of: Callable[[Tensor], Tensor], classes: int, targets: Tensor) -> Tensor:
    """The losses alone, float32 `[S]`; `logits_of` gives `[n, V]` for `[n, H]`."""
    step = chunk_rows(classes, hidden.dtype, hidden.device)
    chunks = [
        cross_entropy(logits_of(hidden[at : at + step]), targets[at : at + step]) for at in range(0, len(hidden), step)
    ]
    return torch.cat(chunks) if chunks else hidden.new_empty(0, dtype=torch.float32)


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shaping: Shaping,
        targets: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(hidden)
        losses = []
        step = chunk_rows(len(weight), hidden.dtype, hidden.device)
        room = hidden.new_empty(min(step, len(hidden)), len(weight))  # for each chunk's logits in turn
        for at in range(0, len(hidden), step):
            rows = slice(at, at + step)
            logits = shaping(_linear(hidden[rows], weight, bias, room))
            slope = shaping.slope(logits)
            losses.append(cross_entropy(logits, targets[rows], weights[rows]))
            torch.mm(logits if isinstance(slope, float) else logits * slope, weight, out=grad[rows])
            if isinstance(slope, float) and slope != 1.0:
                grad[rows] *= slope
        every = torch.cat(losses) if losses else hidden.new_empty(0, dtype=torch.float32)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(every)
        return (every * weights).sum(), every

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0].to(grad.dtype), None, None, None, None, None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    out = room[: len(x)]
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def trained_head_loss(
    hidden: Tensor, logits_of: Callable[[Tensor], Tensor], classes: int, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """As `frozen_head_loss` for a head with something to train: autograd, each chunk computed again in backward."""
    total, losses = hidden.new_zeros((), dtype=torch.float32), []
    step = chunk_rows(classes, torch.float32, hidden.device)
    for at in range(0, len(hidden), step):
        rows = slice(at, at + step)
        part = checkpoint(_chunk_loss, hidden[rows], logits_of, targets[rows], use_reentrant=False)
        total = total + (part * weights[rows]).sum()
        losses.append(part.detach())
    return total, torch.cat(losses) if losses else total.new_empty(0)


def _chunk_loss(hidden: Tensor, logits_of: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(hidden).float(), targets, reduction="none")
