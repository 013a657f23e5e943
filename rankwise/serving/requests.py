"""What is asked of the serving engine and what it answers: values, known to both sides of its thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token always.
        top_p: the fewest likeliest tokens whose probabilities reach this, after `top_k` (arXiv:1904.09751).
        top_k: that many likeliest tokens alone; 0: all.
        seed: of the request's own generator; None: drawn afresh.
        logprobs: None: not asked; n: a token's log-probability, and those of that many likeliest.  They are the
            model's own, before temperature and truncation.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Wanted:
    """One completion.

    Attributes:
        prompt: token ids, at least one.
        adapter: its name in the bank, or None for the base.
        max_new_tokens: at least 1.
        stops: ids of which the first that comes ends the answer; it is told as a token, then `Finished("stop")`.
        digest: names the adapter's weights; prompts that begin alike share what was computed only under the same.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 16
    stops: frozenset[int] = frozenset()
    digest: str = ""


@dataclass(frozen=True)
class Token:
    """One token of an answer; `top` are the likeliest (id, log-probability), likeliest first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last word on a request.  `message` says what went wrong."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""
