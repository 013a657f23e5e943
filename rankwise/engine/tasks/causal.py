"""Causal language models: every supervised token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.data.corpus import Corpus
from rankwise.data.stream import LEAST_SHARED, lay
from rankwise.engine.agree import agree
from rankwise.engine.batch import Batch, packed_batch, row_batch
from rankwise.engine.outlet import OfBase, Outlet
from rankwise.engine.tasks.task import Documents, Task, Way


class CausalLM(Task):
    """Documents of one adapter that begin alike share that beginning."""

    hint = "a causal language model is wanted for a Corpus"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
            raise self._refused("has no language-model head")
        if model.config.is_encoder_decoder:
            raise self._refused("has an encoder beside its decoder")

    @property
    def named(self) -> dict[str, Any]:
        return {"use_cache": False}

    def ways(self) -> Iterator[Way]:
        # Some wrappers name no base of theirs, and are given back as their own: what comes out is logits already.
        own = Outlet(self.model)
        first = own if self.model.base_model is self.model else OfBase(self.model)
        yield Way("packed", first, attention=True)
        yield Way("rows", first, attention=False)
        if first is not own:
            yield Way("rows", own, attention=False)

    def probe(self, *, changed: bool = False) -> Corpus:
        """The last two documents are alike at first; every token but the first of each is supervised."""
        sizes = (7, LEAST_SHARED + 2, LEAST_SHARED + 5)
        documents = [np.random.default_rng(seed).integers(self.words, size=size) for seed, size in enumerate(sizes)]
        documents[2][:LEAST_SHARED] = documents[1][:LEAST_SHARED]
        documents[0] = documents[0][::-1].copy() if changed else documents[0]
        tokens, bounds = np.concatenate(documents), np.cumsum([0, *sizes])
        supervised = np.ones(len(tokens), dtype=np.bool_)
        supervised[bounds[:-1]] = False
        return Corpus(tokens, supervised, bounds, np.zeros((len(sizes), 2), dtype=np.int64), ("",))

    def packed(self, examples: Corpus, documents: Documents, runs: Sequence[int]) -> Batch:
        return packed_batch(lay(examples, documents, runs))

    def rows(self, examples: Corpus, documents: Documents) -> Batch:
        return row_batch(lay(examples, documents))

    @torch.no_grad()
    def check(self, examples: Corpus, logits: list[Tensor]) -> None:
        tokens = torch.as_tensor(examples.document(0)[0][:4], device=self.model.device).unsqueeze(0)
        start = self.model(input_ids=tokens, **self.named).logits[0]
        if not agree([start], [logits[0][:4]]):
            raise self._refused("is not causal: what a token predicts depends on what comes after it")
