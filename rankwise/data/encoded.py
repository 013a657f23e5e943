"""Texts as encoders are given them: with the special tokens that their tokenizer puts around one text, or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.data.tokeniser import Tokeniser


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text, or two, `[T]` tokens long.

    Attributes:
        tokens: int32.
        second: bool, True for tokens of the second text, where the model tells them apart.
        special: bool, True for what the tokenizer put there.
        whole: False where text was cut off.
    """

    tokens: np.ndarray
    second: np.ndarray
    special: np.ndarray
    whole: bool


def encoded(
    tokeniser: Tokeniser,
    texts: Sequence[str],
    seconds: Sequence[str] | None,
    most: int,
    *,
    target: bool = False,
) -> list[Encoded]:
    """Each text, with the second one of the same place, at most so many tokens long; of two the longer is cut first.

    Args:
        tokeniser: of the model.
        texts, seconds: what is read.
        most: tokens, special ones included.
        target: the texts are to be written, not read; some tokenizers frame those differently.
    """
    if not texts:
        return []
    limit = tokeniser.characters(most)
    first, second = [text[:limit] for text in texts], [text[:limit] for text in seconds or ()]
    given = {"text_target": first} if target else {"text": first, **({"text_pair": second} if seconds else {})}
    batch = tokeniser.tokenizer(
        **given,
        truncation="longest_first",
        max_length=most,
        padding=False,
        return_token_type_ids=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    types = batch.get("token_type_ids")
    told_apart = "token_type_ids" in tokeniser.tokenizer.model_input_names and types is not None
    found = []
    for i, ids in enumerate(batch["input_ids"]):
        cut = bool(batch.encodings[i].overflowing) or any(len(group[i]) > limit for group in (texts, seconds) if group)
        found.append(
            Encoded(
                np.asarray(ids, dtype=np.int32),
                np.asarray(types[i] if told_apart else np.zeros(len(ids)), dtype=np.bool_),
                np.asarray(batch["special_tokens_mask"][i], dtype=np.bool_),
                whole=not cut,
            )
        )
    return found
