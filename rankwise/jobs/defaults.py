"""Settings that are other by task, each with its reason; those of causal language models stand in `request.py`."""

from __future__ import annotations

from typing import Any

from rankwise.formats.record import WHOLE

_TEXT_LENGTH = (512, "what encoders are made for; a model that takes less cuts at its own limit")
_FEW_LABELS = (32, "a label teaches little, so steps are counted in documents, whatever their length")

BY_TASK: dict[str, dict[str, tuple[Any, str]]] = {
    "causal-lm": {},
    "masked-lm": {"max_length": _TEXT_LENGTH},
    "seq2seq": {
        "max_length": (512, "of a source and of a target each; longer ones are cut, and counted"),
        "lr": (5e-4, "the upper end of the guides' range: encoder–decoders were trained at high rates"),
    },
    "sequence-classification": {
        "max_length": _TEXT_LENGTH,
        "batch_documents": _FEW_LABELS,
        "epochs": (3.0, "a document teaches one label only; the best of three passes is kept"),
        "lr": (5e-4, "the upper end of the guides' range: a fresh head has far to go"),
    },
    "image-classification": {
        "batch_documents": (32, "a label teaches little, so steps are counted in pictures"),
        "epochs": (3.0, "a picture teaches one label only; the best of three passes is kept"),
        "lr": (5e-4, "the upper end of the guides' range: a fresh head has far to go"),
    },
}

_LR = 2e-4  # of an adapter, where its task has none of its own


def by_itself(task: str, form: str) -> dict[str, tuple[Any, str]]:
    """Settings that are other by task, or where all weights are trained, each with its reason and whose that is."""
    own = {name: (value, f"{task}: {reason}") for name, (value, reason) in BY_TASK.get(task, {}).items()}
    if form != WHOLE:
        return own
    lr, _ = own.get("lr", (_LR, ""))
    tenth = f"{form}: a tenth of an adapter's: LoRA wants ten times full fine-tuning's rate (the guides' rule)"
    return own | {
        "lr": (lr / 10, tenth),
        "weight_decay": (0.0, f"{form}: it pulls towards 0, and not to where the weights began"),
    }
