"""How a job tells what it is doing, without knowing who looks on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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


class Stages:
    """Stages of a watch, one after the other, told by title and share; for the length of a `with`."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._title = ""
        self._advance: Advance = lambda share: None
        self._held = ExitStack()

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    def __call__(self, title: str, share: float) -> None:
        if title != self._title:
            self._held.close()
            self._title, self._advance = title, self._held.enter_context(self.watch.stage(title))
        self._advance(share)
