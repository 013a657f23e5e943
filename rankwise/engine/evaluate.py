"""Losses document by document, for the base and for adapters, on the same documents in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.data.examples import Examples
from rankwise.engine.classified import Classified
from rankwise.engine.forward import Forward
from rankwise.engine.paired import Difference, paired_difference
from rankwise.engine.tasks.choose import task_for
from rankwise.engine.weights import at_rest
from rankwise.errors import DataError
from rankwise.surgery.bank import Bank
from rankwise.surgery.routing import Way

Progress = Callable[[int, int], None]  # documents done, of how many
FREQUENCIES = "class frequencies"


def document_losses(
    forward: Forward,
    examples: Examples,
    names: Sequence[Way],
    micro_tokens: int,
    progress: Progress | None = None,
) -> np.ndarray:
    """Summed loss of every document under every adapter (None: the base), in nats, float64 `[adapters, documents]`."""
    return measured_documents(forward, examples, names, micro_tokens, progress)[0]


def measured_documents(
    forward: Forward,
    examples: Examples,
    names: Sequence[Way],
    micro_tokens: int,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `document_losses`, and the class that each was said to be of, int64, of the same shape; 0 without classes.

    Documents go by in the order of their length, a stream at a time; no more than a stream is held.
    """
    losses = np.zeros((len(names), len(examples)))
    predicted = np.zeros(losses.shape, dtype=np.int64)
    lengths = examples.lengths()
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
            found = forward.measure(examples, waiting, [(name, len(waiting))])
            losses[row, waiting] = found.documents
            if found.predicted is not None:
                predicted[row, waiting] = found.predicted
        done += len(waiting)
        waiting, held = [], 0
        if progress is not None:
            progress(done, len(examples))
    return losses, predicted


@dataclass(frozen=True)
class Evaluation:
    """Losses per document and what they say.

    Attributes:
        names: the adapters, in the order asked for.
        tokens: int64 `[documents]`, supervised tokens of each.
        base: float64 `[documents]`, summed losses of the bare base.
        losses: float64 `[adapters, documents]`.
        differences: of each adapter from the base.
        reference: what stands in the base's place: `base` itself, or `class frequencies` (see `evaluate`).
        classified: which classes were said, where there are classes.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    base: np.ndarray
    losses: np.ndarray
    differences: tuple[Difference, ...]
    reference: str = "base"
    classified: Classified | None = None

    def loss(self, summed: np.ndarray) -> float:
        """Nats per supervised token."""
        return float(summed.sum() / self.tokens.sum())

    def summary(self) -> dict[str, Any]:
        """What `rankwise evaluate --json` prints."""
        said = self.classified
        named = {} if said is None else {"reference": self.reference, "classes": list(said.classes)}
        return {
            "documents": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            **named,
            "base": {"loss": self.loss(self.base), **({} if said is None else said.of_base())},
            "adapters": [
                {
                    "name": name,
                    "loss": self.loss(losses),
                    "delta": {"mean": delta.mean, "low": delta.low, "high": delta.high},
                    **({} if said is None else said.of_adapter(row)),
                }
                for row, (name, losses, delta) in enumerate(zip(self.names, self.losses, self.differences, strict=True))
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
    examples: Examples,
    *,
    micro_tokens: int = 2048,
    frequencies: Sequence[int] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """The base and each named adapter on every document, paired, with 95 % intervals (`engine/paired.py`).

    Args:
        bank: holds the adapters.
        names: of them.
        examples: what is judged.
        micro_tokens: at once.
        frequencies: how often each class is learnt from.  Where the head is fresh a base says nothing; with these it is
            not asked, and in its place stands what knows the frequencies alone: it gives each class its share as
            probability, and always says the most frequent one.
        progress: is told documents done.

    Raises:
        BankError: no such adapter.
        DataError: fewer than two documents, or frequencies of other classes.
        ModelError: not a model for such examples.
    """
    asked: list[str | None] = [*names] if frequencies else [None, *names]
    found = measured(bank, asked, examples, micro_tokens=micro_tokens, progress=progress)
    return compared(names, examples, *found, frequencies)


def measured(
    bank: Bank,
    names: Sequence[Way],
    examples: Examples,
    *,
    micro_tokens: int = 2048,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `measured_documents`, with a hold on the model for as long as that takes."""
    with at_rest(bank.model), Forward(bank, task_for(examples)) as forward:
        return measured_documents(forward, examples, names, micro_tokens, progress)


def base_losses(bank: Bank, examples: Examples, frequencies: Sequence[int] = ()) -> np.ndarray:
    """Summed loss of every document, `[documents]`, of the base, or of what stands in its place (see `evaluate`).

    Raises:
        DataError: frequencies of other classes.
    """
    if not frequencies:
        return measured(bank, [None], examples)[0][0]
    labels, classes = getattr(examples, "labels", None), getattr(examples, "classes", ())
    return -np.log(_shares(frequencies, classes))[labels]


def _shares(frequencies: Sequence[int], classes: Sequence[str]) -> np.ndarray:
    if len(frequencies) != len(classes):
        raise DataError(f"{len(frequencies)} frequencies for {len(classes)} classes", hint="give one for each class")
    return (np.asarray(frequencies) + 1) / (np.sum(frequencies) + len(frequencies))  # none is impossible


def compared(
    names: Sequence[str],
    examples: Examples,
    losses: np.ndarray,
    predicted: np.ndarray,
    frequencies: Sequence[int] = (),
) -> Evaluation:
    """What was measured, paired with its first row, or with the frequencies where there are some.

    Args:
        names: of the other rows; of all of them beside frequencies.
        examples, frequencies: as in `evaluate`.
        losses, predicted: as `measured_documents` gives them, of whatever models.

    Raises:
        DataError: fewer than two documents, or frequencies of other classes.
    """
    labels, classes = getattr(examples, "labels", None), getattr(examples, "classes", ())
    if frequencies:
        shares = _shares(frequencies, classes)
        losses = np.vstack([-np.log(shares)[labels], losses])
        predicted = np.vstack([np.full(len(examples), int(shares.argmax())), predicted])
    tokens = examples.supervised_counts()
    differences = tuple(paired_difference(row, losses[0], tokens) for row in losses[1:])
    said = None if labels is None else Classified(tuple(classes), labels, predicted[0], predicted[1:])
    reference = FREQUENCIES if frequencies else "base"
    return Evaluation(tuple(names), tokens, losses[0], losses[1:], differences, reference, said)
