"""How a job comes to the documents of a task: what their classes are, how they are read, and what one looks like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from rankwise.data.classes import Classes, check_known, find_classes
from rankwise.data.examples import Examples
from rankwise.data.intake import Overlong
from rankwise.data.picture_files import PictureSource, read_pictures
from rankwise.data.pictures import Look
from rankwise.data.prepare import Prepared, Progress, prepare
from rankwise.data.reading import Marked, Reading
from rankwise.data.rows import is_file
from rankwise.data.template import Template, TrainOn
from rankwise.data.text_readings import LabelledTexts, PlainTexts, SourceTargets
from rankwise.frozen.heads import class_names
from rankwise.frozen.load import Base, load_base, read_config
from rankwise.tasks import TASKS

PICTURES = "image-classification"


class Reader(ABC):
    """Sources to examples.  `digest`: of all that decides how the model is talked to."""

    digest: str

    @abstractmethod
    def read(self, sources: Sequence[str], part: str, progress: Progress) -> Prepared:
        """`part` is what they are for: `train`, `valid` or `test`."""

    @abstractmethod
    def shown(self, examples: Examples) -> Marked:
        """The first document, for people."""


@dataclass
class TextReader(Reader):
    reading: Reading
    max_length: int
    overlong: Overlong

    def __post_init__(self) -> None:
        self.digest = self.reading.digest

    def read(self, sources: Sequence[str], part: str, progress: Progress) -> Prepared:
        return prepare(sources, self.reading, self.max_length, overlong=self.overlong, progress=progress)

    def shown(self, examples: Examples) -> Marked:
        return self.reading.shown(examples, 0)


@dataclass
class PictureReader(Reader):
    look: Look
    classes: Classes

    def __post_init__(self) -> None:
        self.digest = self.look.digest

    def read(self, sources: Sequence[str], part: str, progress: Progress) -> Prepared:
        return read_pictures(sources, self.look, self.classes, part=part, progress=progress)

    def shown(self, examples: Any) -> Marked:
        return [(f"{examples.origin(0)} → ", False), (examples.classes[int(examples.labels[0])], True)]


def check_sources(task: str, sources: Sequence[str]) -> None:
    """That they are there, before a model is loaded.

    Raises:
        DataError: one is not.
    """
    for source in sources:
        if task == PICTURES:
            PictureSource(source)
        else:
            is_file(source)


def learnt_classes(task: str, train: Sequence[str], judged: dict[str, str]) -> Classes | None:
    """The classes of a task that has some, found before a model is loaded.

    Args:
        task: which one.
        train: what is learnt from.
        judged: other sources, by what they are for.

    Raises:
        DataError: rows without a label, fewer than two classes, or other classes in what is judged by; all listed.
    """
    if not TASKS[task].classifies:
        return None
    if task != PICTURES:
        classes = find_classes(train)
        for path in judged.values():
            check_known(classes, path)
        return classes
    first, *rest = [PictureSource(source) for source in train]
    classes = first.classes()
    for source in [*rest, *(PictureSource(source, part) for part, source in judged.items())]:
        source.check_known(classes)
    counts = [sum(count) for count in zip(*(source.counts(classes) for source in (first, *rest)), strict=True)]
    return Classes(classes.names, classes.labels, tuple(counts))


def load_for(model: str, task: str, classes: Classes | None, **loading: Any) -> tuple[Base, Classes | None]:
    """The model for a task, and the classes in the order in which it has them; `loading` as of `load_base`.

    Raises:
        ModelError, SpecError: of loading.
    """
    if classes is None:
        base = load_base(model, task=task, **loading)
        own = base.classes
        return base, Classes(own, tuple(range(len(own)))) if own else None
    ordered = classes.as_ordered(class_names(read_config(model))) or classes
    return load_base(model, task=task, classes=ordered.names, **loading), ordered


def reader_for(
    base: Base, classes: Classes | None, *, max_length: int, overlong: Overlong, train_on: TrainOn, seed: int = 0
) -> Reader:
    """How documents are read for a model that was loaded for its task.

    Raises:
        DataError: its tokenizer is not made for that.
    """
    if base.task == PICTURES:
        assert classes is not None
        return PictureReader(look_of(base), classes)
    if base.task == "causal-lm":
        return TextReader(Template(base.tokenizer, train_on), max_length, overlong)
    readings: dict[str, Any] = {
        "masked-lm": lambda: PlainTexts(base.tokenizer, base.model.get_input_embeddings().weight.shape[0], seed),
        "seq2seq": lambda: SourceTargets(base.tokenizer),
        "sequence-classification": lambda: LabelledTexts(base.tokenizer, classes or Classes((), ())),
    }
    return TextReader(readings[base.task](), min(max_length, longest_text(base.model)), overlong)


def look_of(base: Base) -> Look:
    """How the model wants its pictures, and how many tokens it makes of each."""
    config = base.model.config
    channels = getattr(config, "num_channels", 3)
    patch = getattr(config, "patch_size", None) or 16
    height, width = _size(base)
    across, down = (patch, patch) if isinstance(patch, int) else patch
    return Look(base.tokenizer, channels, max(1, (height // across) * (width // down)) + 1)


def _size(base: Base) -> tuple[int, int]:
    """Of the pictures that the processor makes, found by making one."""
    from PIL import Image

    probe = Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8))
    found = Look(base.tokenizer, getattr(base.model.config, "num_channels", 3), 1).resized(probe)
    return int(found.shape[1]), int(found.shape[2])


def longest_text(model: Any) -> int:
    """How many tokens a model takes that numbers its positions; RoBERTa begins behind its padding's number."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name:
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(limits)
