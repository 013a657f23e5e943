"""What things are called, by task: what a loss is of, and what the tuned model is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.reports.numbers import decimal
from rankwise.reports.run import AdapterLoss, BaseLoss, Run
from rankwise.tasks import DEFAULT, TASKS

_REFERENCES = {"base": "the base", "class frequencies": "the class frequencies alone"}


@dataclass(frozen=True)
class Words:
    """The words of one run.

    Attributes:
        unit: what a loss is of, beside a number of nats.
        item: the same, in full.
        reference: what stands beside the adapters, in a table; `against`: in a sentence.
        classes: one of so many classes is said of a document, so that there is an accuracy and no perplexity.
    """

    unit: str = "token"
    item: str = "supervised token"
    reference: str = "base"
    against: str = "the base"
    classes: bool = False

    @property
    def nats(self) -> str:
        return f"nats/{self.unit}"

    @classmethod
    def of(cls, run: Run) -> Words:
        task = TASKS.get(run.record.task, TASKS[DEFAULT])
        reference = run.evaluation.reference if run.evaluation else "base"
        against = _REFERENCES.get(reference, reference)
        return cls(task.unit, task.item, reference, against, task.classifies)


USUAL = Words()


def share(value: float) -> str:
    """An accuracy in per cent."""
    return f"{decimal(100 * value, 1)} %"


def accuracy(one: BaseLoss | AdapterLoss, *, interval: bool = True) -> str:
    """`91.2 % (88.4 … 93.4)`, or nothing where there are no classes."""
    if one.accuracy is None:
        return ""
    ends = f" ({decimal(100 * one.accuracy.low, 1)} … {decimal(100 * one.accuracy.high, 1)})" if interval else ""
    return share(one.accuracy.value) + ends
