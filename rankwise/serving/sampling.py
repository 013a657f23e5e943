"""From logits to tokens: rows together, each as it asks, none changed by its neighbours.

Shape letters: R rows, V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rankwise.serving.requests import Sampling, Token

_SHORTLIST = 1024  # the likeliest words, looked at before all are sorted


def sampled(logits: Tensor, wanted: Sequence[Sampling], chances: Sequence[np.random.Generator]) -> list[Token | None]:
    """One token a row of `[R, V]`; None where a row has a value that is not a number, or no finite one.

    Draws one number of a row's generator where its temperature is not 0.
    """
    best = logits.argmax(-1)
    top = logits.gather(1, best.unsqueeze(1)).squeeze(1)  # NaN and +inf come out on top
    ids, sound = best.tolist(), torch.isfinite(top).tolist()
    drawn = [i for i, one in enumerate(wanted) if one.temperature > 0 and sound[i]]
    if drawn:
        asked = [wanted[i] for i in drawn]
        numbers = [float(chances[i].random()) for i in drawn]
        rows = logits if len(drawn) == len(wanted) else logits[torch.tensor(drawn, device=logits.device)]
        for i, token in zip(drawn, _drawn(rows.float(), asked, numbers), strict=True):
            ids[i] = token
    said: list[Token | None] = [Token(token) if fine else None for token, fine in zip(ids, sound, strict=True)]
    for i, one in enumerate(wanted):
        if one.logprobs is not None and sound[i]:
            said[i] = _with_logprobs(logits[i], ids[i], one.logprobs)
    return said


def _with_logprobs(row: Tensor, token: int, count: int) -> Token:
    logprobs = row.float().log_softmax(-1)
    top = logprobs.topk(min(count, len(row)))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Token(token, float(logprobs[token]), tuple(likeliest))


def _drawn(logits: Tensor, wanted: Sequence[Sampling], numbers: Sequence[float]) -> list[int]:
    """By the inverse of each row's distribution; a row that keeps only the likeliest words has them sorted."""
    heat = torch.tensor([one.temperature for one in wanted], device=logits.device).unsqueeze(1)
    top = logits.max(-1, keepdim=True).values
    weights = ((logits - top) / heat).exp_()  # the likeliest has 1, however cold it is
    found: list[int] = []
    for row, one, number in zip(weights, wanted, numbers, strict=True):
        if not one.top_k and one.top_p >= 1:
            found.append(_of(row, number))
            continue
        kept, words = _likeliest(row, one)
        found.append(int(words[_of(kept, number)]))
    return found


def _likeliest(weights: Tensor, wanted: Sampling) -> tuple[Tensor, Tensor]:
    """The weights that take part, falling, and their words."""
    size = len(weights)
    most = min(wanted.top_k or size, size)
    values, words = weights.topk(min(most, _SHORTLIST))
    whole = weights.double().sum() if most == size else None
    if wanted.top_p < 1:
        limit = float(whole) * wanted.top_p if whole is not None else None
        if len(values) < most and (limit is None or float(values.double().sum()) < limit):
            values, words = weights.sort(descending=True, stable=True)
            values, words = values[:most], words[:most]
        sums = values.double().cumsum(0)
        limit = float(sums[-1]) * wanted.top_p if limit is None else limit
        kept = int((sums < limit).sum()) + 1
        return values[:kept], words[:kept]
    if len(values) < most:
        values, words = weights.topk(most)
    return values, words


def _of(weights: Tensor, number: float) -> int:
    """Where `number`, of [0, 1), falls among the weights; never on one that is 0."""
    sums = weights.double().cumsum(0)
    at = int(torch.searchsorted(sums, number * float(sums[-1]), right=True))
    return min(at, int(torch.searchsorted(sums, float(sums[-1]))))
