"""How a job tells what it is doing, without knowing who looks on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

Advance = Callable[[float], None]  # how far a stage is, from 0 to 1


class Watch(Protocol):
    """Somebody who looks on."""

    def stage(self, title: str) -> AbstractContextManager[Advance]:
        """A piece of work that takes a while; the context's value is told how far it is."""
        ...

    def say(self, text: str) -> None:
        """A line or a block to be read."""
        ...

    def event(self, event: dict[str, Any]) -> None:
        """An event of training, as in metrics.jsonl."""
        ...


class Quiet:
    """Looks on and says nothing: for use as a library, and for --json."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        yield lambda share: None

    def say(self, text: str) -> None:
        pass

    def event(self, event: dict[str, Any]) -> None:
        pass
