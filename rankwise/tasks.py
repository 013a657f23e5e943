"""What a model is trained for: told once, for loading, learning, reporting and for other tools.  Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

TaskName = Literal["causal-lm", "masked-lm", "seq2seq", "sequence-classification", "image-classification"]
DEFAULT: TaskName = "causal-lm"


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        loads: transformers' class that reads such a model.
        reads: its class for what stands before the model.
        pipeline: the Hub's name for it.
        item: what is judged, one loss each.
        unit: short for it, beside a number of nats.
        peft: PEFT's name for it, where it has one.
        classifies: whether one of so many classes is said of a document.
    """

    loads: str
    reads: str
    pipeline: str
    item: str
    unit: str
    peft: str | None = None
    classifies: bool = False


TASKS: dict[str, Task] = {
    "causal-lm": Task(
        "AutoModelForCausalLM", "AutoTokenizer", "text-generation", "supervised token", "token", "CAUSAL_LM"
    ),
    "masked-lm": Task("AutoModelForMaskedLM", "AutoTokenizer", "fill-mask", "hidden token", "token"),
    "seq2seq": Task(
        "AutoModelForSeq2SeqLM", "AutoTokenizer", "text2text-generation", "target token", "token", "SEQ_2_SEQ_LM"
    ),
    "sequence-classification": Task(
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        "text-classification",
        "document",
        "document",
        "SEQ_CLS",
        classifies=True,
    ),
    "image-classification": Task(
        "AutoModelForImageClassification",
        "AutoImageProcessor",
        "image-classification",
        "picture",
        "picture",
        classifies=True,
    ),
}
assert set(TASKS) == set(get_args(TaskName))

_CLASS_ENDS: dict[str, TaskName] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForImageClassification": "image-classification",
}


def task_of(architecture: str, *, paired: bool) -> TaskName | None:
    """The task of one of transformers' model classes, by its name; `paired` models have an encoder and a decoder."""
    if architecture.endswith("ForConditionalGeneration"):
        return "seq2seq" if paired else "causal-lm"
    return next((task for end, task in _CLASS_ENDS.items() if architecture.endswith(end)), None)
