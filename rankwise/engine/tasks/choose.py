"""Which task it is: by name, or by what the examples are."""

from __future__ import annotations

from rankwise.data.corpus import Corpus
from rankwise.data.examples import Examples
from rankwise.data.laid import Labelled, Masked, Pairs
from rankwise.data.pictures import Pictures
from rankwise.engine.tasks.causal import CausalLM
from rankwise.engine.tasks.classes import ImageClassification, SequenceClassification
from rankwise.engine.tasks.masked import MaskedLM
from rankwise.engine.tasks.seq2seq import Seq2Seq
from rankwise.engine.tasks.task import Task

_NAMED: dict[str, type[Task]] = {
    "causal-lm": CausalLM,
    "masked-lm": MaskedLM,
    "seq2seq": Seq2Seq,
    "sequence-classification": SequenceClassification,
    "image-classification": ImageClassification,
}
_TASKS: dict[type[Examples], type[Task]] = {
    Corpus: CausalLM,
    Masked: MaskedLM,
    Pairs: Seq2Seq,
    Labelled: SequenceClassification,
    Pictures: ImageClassification,
}


def task_named(name: str) -> type[Task]:
    """By one of the names in `rankwise.tasks`."""
    return _NAMED[name]


def task_for(examples: Examples) -> type[Task]:
    """How these examples go through a model.

    Raises:
        TypeError: they are of a kind of their own.
    """
    for kind, task in _TASKS.items():
        if isinstance(examples, kind):
            return task
    raise TypeError(f"{type(examples).__name__}: expected one of {', '.join(kind.__name__ for kind in _TASKS)}")
