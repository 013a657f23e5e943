"""Short courses with other people's trainers: what they learn from, and their losses step by step."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.corpora import pattern_corpus

# The least that a trainer has to be told to run here, write nothing and ask nobody.
SHORT: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


def recording(trainer: type[hf.Trainer]) -> type[Any]:
    """The trainer, which also writes down the loss of every step, unrounded."""

    class Recording(trainer):  # type: ignore[misc, valid-type]
        def training_step(self, *given: Any, **named: Any) -> Tensor:
            loss = super().training_step(*given, **named)
            self.losses = [*getattr(self, "losses", []), float(loss)]
            return loss

    return Recording


def documents() -> list[dict[str, list[int]]]:
    """Rows of tokens that can be learnt, with labels on the supervised ones."""
    corpus = pattern_corpus(32)
    rows = []
    for i in range(len(corpus)):
        tokens, mask = corpus.document(i)
        labels = [int(token) if counts else -100 for token, counts in zip(tokens, mask, strict=True)]
        rows.append({"input_ids": tokens.tolist(), "labels": labels, "attention_mask": [1] * len(tokens)})
    return rows


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: torch.tensor([r[name] + [fill[name]] * (width - len(r[name])) for r in rows]) for name in fill}


def sentences() -> list[dict[str, Any]]:
    """Rows of one length and a class each, which the first token tells."""
    tokens = torch.randint(5, 97, (32, 9), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = 3 + torch.arange(32) % 2
    return [{"input_ids": row, "labels": int(row[0] == 3)} for row in tokens]


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The keys of a model's state whose tensors are no longer what they were."""
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}
