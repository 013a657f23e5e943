"""Masked language models: hidden tokens are guessed from both sides (BERT, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.data.corpus import Corpus
from rankwise.data.laid import Masked
from rankwise.data.stream import Stream
from rankwise.engine.agree import agree
from rankwise.engine.batch import Batch, packed_batch, row_batch
from rankwise.engine.outlet import BeforeHead, Outlet
from rankwise.engine.tasks.task import Documents, Task, Way


class MaskedLM(Task):
    """Packed where attention allows it; nothing is shared, since what a token becomes depends on all that follows."""

    hint = "a masked language model is wanted: BERT, RoBERTa, ALBERT, DistilBERT, …"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
            raise self._refused("has no language-model head")
        if model.config.is_encoder_decoder:
            raise self._refused("has an encoder beside its decoder")
        # RoBERTa counts positions from behind the number of the padding token; the probe tells whether that is so.
        named = ((name, one) for name, one in model.named_modules() if isinstance(one, nn.Embedding))
        padding = [one.padding_idx for name, one in named if "position" in name and one.padding_idx is not None]
        self.first_position = padding[0] + 1 if padding else 0

    def ways(self) -> Iterator[Way]:
        for outlet in (BeforeHead, Outlet):
            yield Way("packed", outlet(self.model), attention=True)
        for outlet in (BeforeHead, Outlet):
            yield Way("rows", outlet(self.model), attention=False)

    def probe(self, *, changed: bool = False) -> Masked:
        texts = self._random_texts((7, 18, 21), changed=changed)
        bounds = np.cumsum([0, *map(len, texts)])
        free = np.ones(bounds[-1], dtype=np.bool_)
        corpus = Corpus(np.concatenate(texts), free, bounds, np.zeros((len(texts), 2), dtype=np.int64), ("",))
        return Masked(corpus, mask_token=int(texts[1][0]), words=self.words)

    def packed(self, examples: Masked, documents: Documents, runs: Sequence[int]) -> Batch:
        return packed_batch(_laid(examples, documents), self.first_position)

    def rows(self, examples: Masked, documents: Documents) -> Batch:
        return row_batch(_laid(examples, documents), self.pad)

    @torch.no_grad()
    def check(self, examples: Masked, logits: list[Tensor]) -> None:
        tokens = torch.as_tensor(examples.laid.document(2)[0].astype(np.int64), device=self.model.device)
        other = torch.cat([tokens[:10], tokens[10:].flip(0)])
        ends = [self.model(input_ids=row[None]).logits[0, :10] for row in (tokens, other)]
        if agree(ends[:1], ends[1:], slack=1e-3):
            raise self._refused("sees only what comes before a token, and not both sides")


def _laid(examples: Masked, documents: Documents) -> Stream:
    """One document behind the other; read are the hidden places, where the very token is wanted."""
    pieces = [examples.document(int(number)) for number in documents]
    lengths = [len(shown) for shown, _, _ in pieces]
    bounds = np.cumsum([0, *lengths])
    count = len(pieces)
    return Stream(
        documents=np.asarray(documents, dtype=np.int64),
        tokens=np.concatenate([shown for shown, _, _ in pieces]),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        bounds=tuple(bounds.tolist()),
        after=(-1,) * count,
        holders=tuple(range(count)),
        sources=np.concatenate([begin + places for begin, (_, places, _) in zip(bounds, pieces, strict=False)]),
        targets=np.concatenate([wanted for _, _, wanted in pieces]),
        owners=np.repeat(np.arange(count), [len(places) for _, places, _ in pieces]),
    )
