"""Models that say which class a text or a picture is of; their logits, one row a document, are small."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.data.corpus import Corpus
from rankwise.data.laid import Labelled
from rankwise.data.pictures import Look, Pictures
from rankwise.engine.batch import Batch, padded
from rankwise.engine.outlet import Outlet
from rankwise.engine.tasks.task import Documents, Task, Way
from rankwise.kernels.library import serves


class _Classification(Task):
    classifies = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if not isinstance(model, PreTrainedModel) or not model.config.num_labels > 1:
            raise self._refused("tells no classes apart")

    def ways(self) -> Iterator[Way]:
        if serves(torch.empty(0, dtype=self.model.dtype, device=self.model.device)):
            # torch's attention is slow on processors in bfloat16, and its backward pass takes nine times as long.
            yield Way("rows", Outlet(self.model), attention=True)
        yield Way("rows", Outlet(self.model), attention=False)

    def check(self, examples: Any, logits: list[Tensor]) -> None:
        classes = self.model.config.num_labels
        if any(tuple(one.shape) != (1, classes) for one in logits):
            raise self._refused(f"gives logits {tuple(logits[0].shape)} for a document, expected 1 × {classes} classes")

    @property
    def _classes(self) -> tuple[str, ...]:
        """Of a probe."""
        return tuple(map(str, range(self.model.config.num_labels)))

    def _batch(
        self, inputs: dict[str, np.ndarray], examples: Any, documents: Documents, lengths: np.ndarray | None = None
    ) -> Batch:
        if len(examples.classes) != self.model.config.num_labels:
            told = f"tells {self.model.config.num_labels} classes apart, the documents are of {len(examples.classes)}"
            raise self._refused(told)
        labels = examples.labels[np.asarray(documents, dtype=np.int64)]
        each = np.arange(len(labels))
        return Batch(inputs, each, labels, each, len(labels), lengths=lengths)


class SequenceClassification(_Classification):
    """Texts, or pairs of texts."""

    hint = "a model for sequence classification is wanted: load_base(…, task='sequence-classification')"
    by_rows = "a class is read at one place of each text"

    def probe(self, *, changed: bool = False) -> Labelled:
        texts = [np.append(text, 0) for text in self._random_texts((7, 18, 21), changed=changed)]
        bounds = np.cumsum([0, *map(len, texts)])
        last = np.zeros(bounds[-1], dtype=np.bool_)
        last[bounds[1:] - 1] = True
        corpus = Corpus(np.concatenate(texts), last, bounds, np.zeros((len(texts), 2), dtype=np.int64), ("",))
        return Labelled(corpus, self._classes)

    def rows(self, examples: Labelled, documents: Documents) -> Batch:
        pieces = [examples.document(int(number)) for number in documents]
        tokens, mask = padded([text for text, _ in pieces], self.pad)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if examples.paired:
            inputs["token_type_ids"] = padded([second for _, second in pieces], 0)[0]
        return self._batch(inputs, examples, documents, mask.sum(1))


class ImageClassification(_Classification):
    """Pictures, all of one size."""

    hint = "a model for image classification is wanted: load_base(…, task='image-classification')"
    by_rows = "every picture is as large as any other"

    def probe(self, *, changed: bool = False) -> Pictures:
        config = self.model.config
        size = getattr(config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        shape = (3, channels, height, width)
        pixels = np.random.default_rng(int(changed)).integers(256, size=shape).astype(np.uint8)
        plain = SimpleNamespace(do_rescale=True, rescale_factor=1 / 255, do_normalize=False)
        origins, labels = np.zeros((3, 2), dtype=np.int64), np.zeros(3, dtype=np.int64)
        return Pictures(pixels, labels, self._classes, Look(plain, channels, 1), origins, ("",))

    def rows(self, examples: Pictures, documents: Documents) -> Batch:
        return self._batch({"pixel_values": examples.floats(documents)}, examples, documents)
