"""From hidden states to losses, on supervised tokens only and in chunks: the logits of a batch never exist at once.

Shape letters: S supervised tokens, H hidden width, V the head's own rows, T rows of tokens behind these.
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
from rankwise.surgery.tokens import Words


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


@dataclass(frozen=True)
class Head:
    """A head's weight `[V, H]`, its bias, and the rows that stand in for some of its own or lie behind them."""

    weight: Tensor
    bias: Tensor | None
    words: Words | None

    @property
    def classes(self) -> int:
        return len(self.weight) + (0 if self.words is None else len(self.words.split[1]))

    def logits(self, hidden: Tensor, room: Tensor) -> Tensor:
        """`[n, V + T]`, in the first rows of `room`."""
        logits, known = room[: len(hidden)], len(self.weight)
        if self.bias is not None:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits[:, :known])
        else:
            torch.mm(hidden, self.weight.t(), out=logits[:, :known])
        if self.words is not None:
            inside, behind = self.words.split
            torch.mm(hidden, behind.t(), out=logits[:, known:])
            logits[:, self.words.ids[: len(inside)]] = hidden @ inside.t()
        return logits

    def pull(self, grad: Tensor, hidden: Tensor, out: Tensor) -> Tensor | None:
        """From the gradient of the logits, which is spent: that of `hidden` into `out`, and that of the rows."""
        if self.words is None:
            torch.mm(grad, self.weight, out=out)
            return None
        known, replaced = len(self.weight), self.words.ids[: self.words.inside]
        own = torch.cat([grad[:, replaced], grad[:, known:]], dim=1)
        grad[:, replaced] = 0
        torch.mm(grad[:, :known], self.weight, out=out)
        out.addmm_(own, self.words.rows)
        return (own.t() @ hidden).float()


def chunk_rows(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    limit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(LEAST_CHUNK, limit // (classes * dtype.itemsize))


def frozen_head_loss(
    hidden: Tensor, head: nn.Linear, shaping: Shaping, targets: Tensor, weights: Tensor, words: Words | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses through a frozen head, and the losses themselves, float32 `[S]`.

    The gradient with respect to `hidden` `[S, H]`, and to rows that stand in for the head's (`words`), is made on the
    way forward, chunk by chunk; nothing else is kept.
    """
    rows = None if words is None else words.rows
    return _FrozenHeadLoss.apply(hidden, rows, head.weight, head.bias, shaping, targets, weights, words)


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
        rows: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        shaping: Shaping,
        targets: Tensor,
        weights: Tensor,
        words: Words | None,
    ) -> tuple[Tensor, Tensor]:
        head, grad = Head(weight, bias, words), torch.empty_like(hidden)
        d_rows = None if rows is None else torch.zeros_like(rows, dtype=torch.float32)
        losses = []
        step = chunk_rows(len(weight), hidden.dtype, hidden.device)
        room = hidden.new_empty(min(step, len(hidden)), head.classes)  # for each chunk's logits in turn
        for at in range(0, len(hidden), step):
            chunk = slice(at, at + step)
            logits = shaping(head.logits(hidden[chunk], room))
            slope = shaping.slope(logits)
            losses.append(cross_entropy(logits, targets[chunk], weights[chunk]))
            each = head.pull(logits if isinstance(slope, float) else logits * slope, hidden[chunk], grad[chunk])
            factor = slope if isinstance(slope, float) else 1.0
            if factor != 1.0:
                grad[chunk] *= factor
            if d_rows is not None and each is not None:
                d_rows.add_(each, alpha=factor)
        every = torch.cat(losses) if losses else hidden.new_empty(0, dtype=torch.float32)
        ctx.save_for_backward(grad, None if rows is None or d_rows is None else d_rows.to(rows.dtype))
        ctx.mark_non_differentiable(every)
        return (every * weights).sum(), every

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if kept is None else kept * grads[0].to(kept.dtype) for kept in ctx.saved_tensors]
        return (*found, None, None, None, None, None, None)


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
