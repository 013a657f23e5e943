"""Answers in OpenAI's shapes, whole or in chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from rankwise.serving.answer import Piece, Said, token_bytes, token_text


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    answered: int = 0

    def body(self) -> dict[str, int]:
        both = self.prompt + self.answered
        return {"prompt_tokens": self.prompt, "completion_tokens": self.answered, "total_tokens": both}


@dataclass
class Choice:
    """What one choice has come to."""

    pieces: list[Piece] = field(default_factory=list)
    finish: str | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[Said]:
        return [said for piece in self.pieces for said in piece.tokens]


class Reply:
    """How answers to one request are put.

    Args:
        model: as it was asked for.
        logprobs: whether they are told.
    """

    object = chunk_object = prefix = ""

    def __init__(self, model: str, tokenizer: Any, *, logprobs: bool) -> None:
        self.model, self.tokenizer, self.logprobs = model, tokenizer, logprobs
        self.id = f"{self.prefix}-{uuid4().hex}"
        self.created = int(time.time())

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        listed = [self._choice(i, choice) for i, choice in enumerate(choices)]
        return self._headed(self.object, listed, usage)

    def opening(self, number: int) -> dict[str, Any] | None:
        """A chunk before the first of a choice, where there is one."""
        return None

    def chunk(self, number: int, piece: Piece, finish: str | None = None) -> dict[str, Any]:
        return self._headed(self.chunk_object, [self._part(number, piece, finish)])

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk that tells the usage."""
        return self._headed(self.chunk_object, [], usage)

    def _headed(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return head if usage is None else head | {"usage": usage.body()}

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _part(self, number: int, piece: Piece, finish: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _likely(self, said: Sequence[Said]) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, number: int) -> dict[str, Any]:
        first = {"index": number, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return self._headed(self.chunk_object, [first | {"finish_reason": None}])

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        told = {"logprobs": self._likely(choice.tokens), "finish_reason": choice.finish}
        return {"index": number, "message": message} | told

    def _part(self, number: int, piece: Piece, finish: str | None) -> dict[str, Any]:
        delta = {"content": piece.text} if piece else {}
        return {"index": number, "delta": delta, "logprobs": self._likely(piece.tokens), "finish_reason": finish}

    def _likely(self, said: Sequence[Said]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": [self._told(one) for one in said], "refusal": None}

    def _told(self, said: Said) -> dict[str, Any]:
        top = [self._word(token, logprob) for token, logprob in said.token.top]
        return self._word(said.token.id, said.token.logprob) | {"top_logprobs": top}

    def _word(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, own = token_text(self.tokenizer, token), token_bytes(self.tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": own}


class CompletionReply(Reply):
    """Of /v1/completions."""

    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        told = {"logprobs": self._likely(choice.tokens), "finish_reason": choice.finish}
        return {"index": number, "text": choice.text} | told

    def _part(self, number: int, piece: Piece, finish: str | None) -> dict[str, Any]:
        told = {"logprobs": self._likely(piece.tokens), "finish_reason": finish}
        return {"index": number, "text": piece.text} | told

    def _likely(self, said: Sequence[Said]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "tokens": [token_text(self.tokenizer, one.token.id) for one in said],
            "token_logprobs": [one.token.logprob for one in said],
            "top_logprobs": [{token_text(self.tokenizer, i): p for i, p in one.token.top} for one in said],
            "text_offset": [one.start for one in said],
        }


def event(body: dict[str, Any]) -> str:
    """One server-sent event (WHATWG HTML, section 9.2)."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
