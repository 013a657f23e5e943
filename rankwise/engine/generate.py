"""Answers from the base or an adapter, by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from rankwise.data.template import Template
from rankwise.surgery.bank import Bank
from rankwise.surgery.routing import Way


class _TextStream(BaseStreamer):
    """Hands on each piece of text as soon as it is whole: a character may take several tokens."""

    def __init__(self, tokenizer: Any, stops: Sequence[int], say: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.say = tokenizer, stops, say
        self.tokens: list[int] = []
        self.told = ""
        self.prompted = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompted:
            self.prompted = True
            return
        self.tokens += [token for token in value.reshape(-1).tolist() if token not in self.stops]
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self.say(text[len(self.told) :])
            self.told = text

    def end(self) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        self.say(text[len(self.told) :])


@torch.no_grad()
def stops_of(template: Template, model: Any) -> tuple[int, ...]:
    """Tokens at which an answer is over: the template's, and those that the model itself names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [named] if isinstance(named, int) else list(named or ())
    return tuple(dict.fromkeys([*template.stops, *own]))


def answer(
    bank: Bank,
    name: Way,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    stops: Sequence[int],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    say: Callable[[str], None] | None = None,
) -> str:
    """What an adapter, or a mix (None: the base) answers to `prompt` tokens, up to one of `stops` or `max_new_tokens`.

    The stop itself is no part of the answer, be it a special token or a common one such as a line break.  At
    temperature 0 always the likeliest token; `say` is given the text as it comes.
    """
    model = bank.model
    ids = torch.tensor([list(prompt)], device=model.device)
    chance: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if not temperature:
        chance |= {"temperature": None, "top_p": None, "top_k": None}
    with bank.use(name):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stops) or None,
            pad_token_id=(list(stops) or [0])[0],
            streamer=_TextStream(tokenizer, stops, say) if say is not None else None,
            **chance,
        )
    # A decoder of its own begins with a token that nobody said; any other begins with the prompt.
    begin = 1 if model.config.is_encoder_decoder else ids.shape[1]
    said = [token for token in out[0, begin:].tolist() if token not in stops]
    return tokenizer.decode(said, skip_special_tokens=True)
