"""What may be asked over HTTP, in OpenAI's words, and what an error looks like.

A field that would change the answer and that this server does not know is an error, not a wish to be passed over; one
that changes nothing (`user`, `metadata`, …) may be there.  Fields beyond OpenAI's are vLLM's: `top_k`, `ignore_eos`,
`stop_token_ids`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rankwise.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BankError,
    DataError,
    QueueFullError,
    RankwiseError,
    RequestError,
    SpecError,
    listing,
    nearest,
)
from rankwise.serving.requests import Sampling

MOST_CHOICES = 64  # of one request: prompts times `n`
_MOST_STOPS = 16
_WRONG = (RequestError, AdapterFileError, AdapterMismatchError, BankError, DataError, SpecError)  # of who asks


class RefusedError(RankwiseError):
    """A request that gets no answer; `status` is HTTP's, `code` OpenAI's word for it."""

    def __init__(self, status: int, message: str, *, code: str | None = None, hint: str = "", retry: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.status, self.code, self.retry = status, code, retry

    @property
    def headers(self) -> dict[str, str]:
        found = {"Retry-After": str(self.retry)} if self.retry else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        text = f"{self.message} ({self.hint})" if self.hint else self.message
        return {"error": {"message": text, "type": kind, "param": None, "code": self.code}}


def refusal(error: RankwiseError) -> RefusedError:
    """What a person over HTTP is told of an error: a mistake of theirs is a 4xx."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, QueueFullError):
        return RefusedError(429, error.message, code="queue_full", hint=error.hint, retry=1)
    if isinstance(error, _WRONG):
        return RefusedError(400, error.message, code=_snake(type(error).__name__), hint=error.hint)
    return RefusedError(500, error.message, code=_snake(type(error).__name__), hint=error.hint)


def _snake(name: str) -> str:
    plain = name.removesuffix("Error")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in plain).lstrip("_")


def unknown_model(name: str, known: Sequence[str]) -> RefusedError:
    return RefusedError(
        404,
        f"no model {name!r}{nearest(name, known)}",
        code="model_not_found",
        hint="GET /v1/models lists what is served",
    )


# ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Text(_Body):
    type: Literal["text"]
    text: str


class Turn(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Text] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # never done


class _Format(_Body):
    type: Literal["text"]


class Asked(_Body):
    """What a chat and a completion have in common."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    # Neutral where they may be there at all.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return 0 if value == 0 and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _stops_are_some(self) -> Asked:
        if len(self.stops) > _MOST_STOPS:
            raise ValueError(f"stop has {len(self.stops)} strings, {_MOST_STOPS} are allowed")
        if not all(self.stops):
            raise ValueError("stop has an empty string, at which every answer would end at once")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is there, and stream is not true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Of a stream, in a chunk of its own."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are told beside each; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def longest(self) -> int | None:
        """Tokens of an answer, if that is said."""
        return self.max_tokens

    def sampling(self, number: int) -> Sampling:
        """Of one of the choices; with a seed each has its own, the first that which was asked for."""
        seed = None if self.seed is None else (self.seed + number) % (1 << 63)
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=seed,
            logprobs=self.likeliest,
        )


class AskedChat(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _Format | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _agrees(self) -> AskedChat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is there, and logprobs is not true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ")
        return self

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class AskedCompletion(Asked):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: Literal[False] | None = False
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> AskedCompletion:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError(f"best_of is {self.best_of} and n is {self.choices}; best_of is not served")
        if not self.prompts:
            raise ValueError("prompt is an empty list")
        if len(self.prompts) * self.choices > MOST_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts times n = {self.choices}, {MOST_CHOICES} are allowed")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def longest(self) -> int | None:
        return self.max_tokens or 16  # as OpenAI


class LoadAdapter(_Body):
    """The body of vLLM's /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False


class UnloadAdapter(_Body):
    """The body of vLLM's /v1/unload_lora_adapter; `lora_int_id` means nothing here."""

    lora_name: Annotated[str, Field(min_length=1)]
    lora_int_id: int | None = None


Kind = TypeVar("Kind", bound=_Body)


def read_body(kind: type[Kind], body: bytes) -> Kind:
    """A request's body, if it is one.

    Raises:
        RefusedError: 400; lists every problem.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {str(error).splitlines()[0]}", code="invalid_json") from None
    if not isinstance(found, Mapping):
        raise RefusedError(400, "the body is JSON, but no object", code="invalid_json")
    try:
        return kind.model_validate(found, strict=True)
    except ValidationError as error:
        problems = list(dict.fromkeys(_sentence(problem, list(kind.model_fields)) for problem in error.errors()))
        few = problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n{listing(problems)}"
        raise RefusedError(400, few, code="invalid_value") from None


def _sentence(problem: Any, known: list[str]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{where}: not known here{nearest(where, known)}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    given = repr(problem["input"])
    return f"{where} = {given[:80]}: {said}" if where else said
