"""Models with an encoder and a decoder: a text is read, each token of another predicted from it and those before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rankwise.data.corpus import Corpus
from rankwise.data.laid import Pairs
from rankwise.engine.batch import Batch, padded
from rankwise.engine.outlet import BeforeHead, OfBase, Outlet
from rankwise.engine.tasks.task import Documents, Task, Way


class Seq2Seq(Task):
    """A row a pair, sources and targets padded each to their longest."""

    hint = "a model with encoder and decoder is wanted: T5, BART, MarianMT, …"
    by_rows = "each source stands beside its target"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
            raise self._refused("has no encoder beside its decoder")
        if model.get_output_embeddings() is None:
            raise self._refused("has no language-model head")
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise self._refused("does not say how its decoder begins")

    @property
    def named(self) -> dict[str, Any]:
        return {"use_cache": False}

    def ways(self) -> Iterator[Way]:
        for outlet in (BeforeHead, OfBase, Outlet):
            yield Way("rows", outlet(self.model), attention=False)

    def probe(self, *, changed: bool = False) -> Pairs:
        sources = self._random_texts((7, 18, 21), changed=changed)
        targets = self._random_texts((5, 9, 3), changed=changed)
        tokens = [part for pair in zip(sources, targets, strict=True) for part in pair]
        mask = np.repeat([False, True] * len(sources), [len(part) for part in tokens])
        bounds = np.cumsum([0, *(len(s) + len(t) for s, t in zip(sources, targets, strict=True))])
        origins = np.zeros((len(sources), 2), dtype=np.int64)
        return Pairs(Corpus(np.concatenate(tokens), mask, bounds, origins, ("",)))

    def rows(self, examples: Pairs, documents: Documents) -> Batch:
        pieces = [examples.document(int(number)) for number in documents]
        sources, source_mask = padded([source for source, _ in pieces], self.pad)
        targets, target_mask = padded([target for _, target in pieces], self.pad)
        begun = self.model.prepare_decoder_input_ids_from_labels(labels=torch.as_tensor(targets))
        inputs = {
            "input_ids": sources,
            "attention_mask": source_mask,
            "decoder_input_ids": begun.numpy(),
            "decoder_attention_mask": target_mask,
        }
        places = np.flatnonzero(target_mask)
        return Batch(inputs, places, targets.reshape(-1)[places], places // targets.shape[1], len(pieces))
