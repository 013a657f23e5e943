"""One request and the engine: its choices are submitted together and followed to their ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.errors import QueueFullError
from rankwise.serving.answer import Answer, Piece
from rankwise.serving.engine import Engine
from rankwise.serving.metrics import Metrics
from rankwise.serving.replies import Usage
from rankwise.serving.requests import Finished, Token, Wanted
from rankwise.serving.wire import RefusedError


class GoneError(Exception):
    """The client has closed the connection."""


@dataclass(frozen=True)
class News:
    """Of one choice: text that can be sent, and why it is over, if it is."""

    number: int
    piece: Piece
    finish: str | None = None


class Exchange:
    """Args:
    until: stop strings.

    Attributes:
        usage: so far.
    """

    def __init__(self, engine: Engine, tokenizer: Any, metrics: Metrics, until: Sequence[str]) -> None:
        self.engine, self.tokenizer, self.metrics, self.until = engine, tokenizer, metrics, until
        self.usage = Usage()
        self._news: asyncio.Queue[tuple[int, Token | Finished] | None] = asyncio.Queue()
        self._tickets: list[Any] = []
        self._answers: list[Answer] = []
        self._begin = time.perf_counter()

    def submit(self, wanted: Sequence[Wanted]) -> None:
        """All of them or none.

        Raises:
            RequestError: one can never be answered.
            QueueFullError: too many are waiting.
        """
        loop = asyncio.get_running_loop()
        if len(wanted) > self.engine.max_waiting:
            raise QueueFullError(f"{len(wanted)} answers at once", hint=f"up to {self.engine.max_waiting} may wait")
        try:
            for number, one in enumerate(wanted):
                self._answers.append(Answer(self.tokenizer, one.stops, self.until))

                def listen(what: Token | Finished, number: int = number) -> None:
                    loop.call_soon_threadsafe(self._news.put_nowait, (number, what))

                self._tickets.append(self.engine.submit(one, listen))
        except Exception:
            self.cancel()
            raise

    @property
    def choices(self) -> int:
        return len(self._answers)

    def leave(self) -> None:
        """Whoever asked has gone."""
        self._news.put_nowait(None)

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def follow(self) -> AsyncIterator[News]:
        """What comes, of all choices, until the last is over.

        Raises:
            GoneError: the client has left.
            RefusedError: 5xx; the engine could not go on.
        """
        going = set(range(len(self._answers)))
        while going:
            told = await self._news.get()
            if told is None:
                self.metrics.cut_off.inc()
                raise GoneError
            number, what = told
            if number not in going:
                continue
            found = self._heard(number, what)
            if found.finish is not None:
                going.discard(number)
            if found.piece or found.finish is not None:
                yield found
        self.metrics.whole.observe(time.perf_counter() - self._begin)

    def _heard(self, number: int, what: Token | Finished) -> News:
        answer = self._answers[number]
        if isinstance(what, Token):
            if not self.usage.answered:
                self.metrics.first.observe(time.perf_counter() - self._begin)
            self.usage.answered += 1
            piece = answer.hear(what)
            if answer.stopped:
                self._tickets[number].cancel()
            return News(number, piece, "stop" if answer.stopped else None)
        if what.reason == "error":
            raise RefusedError(500, what.message or "the engine failed", code="engine_error")
        if what.reason == "cancelled":
            raise RefusedError(503, what.message or "the engine was stopped", code="stopping", retry=5)
        piece = answer.end()
        return News(number, piece, "stop" if answer.stopped else what.reason)
