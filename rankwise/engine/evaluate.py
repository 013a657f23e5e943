"""Losses document by document, for the base and for adapters, on the same documents in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.data.corpus import Corpus
from rankwise.engine.forward import Forward
from rankwise.engine.paired import Difference, paired_difference
from rankwise.surgery.bank import Bank

Progress = Callable[[int, int], None]  # documents done, of how many


def document_losses(
    forward: Forward,
    corpus: Corpus,
    names: Sequence[str | None],
    micro_tokens: int,
    progress: Progress | None = None,
) -> np.ndarray:
    """Summed loss of every document under every adapter (None: the base), in nats, float64 `[adapters, documents]`.

    Documents go by in the order of their length, a stream at a time; no more than a stream is held.
    """
    losses = np.zeros((len(names), len(corpus)))
    lengths = corpus.lengths()
    waiting: list[int] = []
    held = done = 0
    queue = np.argsort(-lengths, kind="stable")
    for i, document in enumerate(queue):
        waiting.append(int(document))
        held += int(lengths[document])
        last = i + 1 == len(queue)
        if not last and held + lengths[queue[i + 1]] <= micro_tokens:
            continue
        for row, name in enumerate(names):
            losses[row, waiting] = forward.measure(corpus, waiting, [(name, len(waiting))]).documents
        done += len(waiting)
        waiting, held = [], 0
        if progress is not None:
            progress(done, len(corpus))
    return losses


@dataclass(frozen=True)
class Evaluation:
    """Losses per document and what they say.

    Attributes:
        names: the adapters, in the order asked for.
        tokens: int64 `[documents]`, supervised tokens of each.
        base: float64 `[documents]`, summed losses of the bare base.
        losses: float64 `[adapters, documents]`.
        differences: of each adapter from the base.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    base: np.ndarray
    losses: np.ndarray
    differences: tuple[Difference, ...]

    def loss(self, summed: np.ndarray) -> float:
        """Nats per supervised token."""
        return float(summed.sum() / self.tokens.sum())

    def summary(self) -> dict[str, Any]:
        """What `rankwise evaluate --json` prints."""
        return {
            "documents": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            "base": {"loss": self.loss(self.base)},
            "adapters": [
                {
                    "name": name,
                    "loss": self.loss(losses),
                    "delta": {"mean": delta.mean, "low": delta.low, "high": delta.high},
                }
                for name, losses, delta in zip(self.names, self.losses, self.differences, strict=True)
            ],
        }

    def record(self) -> dict[str, Any]:
        """The summary with the losses of every document, for the report."""
        return self.summary() | {
            "confidence": self.differences[0].confidence if self.differences else None,
            "per_document": {
                "tokens": self.tokens.tolist(),
                "base": self.base.tolist(),
                "adapters": {n: row.tolist() for n, row in zip(self.names, self.losses, strict=True)},
            },
        }


def evaluate(
    bank: Bank,
    names: Sequence[str],
    corpus: Corpus,
    *,
    micro_tokens: int = 2048,
    progress: Progress | None = None,
) -> Evaluation:
    """The base and each named adapter on every document, paired, with 95 % intervals (`engine/paired.py`).

    Raises:
        BankError: no such adapter.
        DataError: fewer than two documents.
        ModelError: not a causal language model.
    """
    with Forward(bank) as forward:
        losses = document_losses(forward, corpus, [None, *names], micro_tokens, progress)
    tokens = corpus.supervised_counts()
    differences = tuple(paired_difference(row, losses[0], tokens) for row in losses[1:])
    return Evaluation(tuple(names), tokens, losses[0], losses[1:], differences)
