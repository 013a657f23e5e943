"""Ctrl-C and SIGTERM, heard between two pieces of work so that what is done can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Someone asked for a stop; `number` is the signal, `way_on` says how to go on.

    Not an error but a wish, and so, like KeyboardInterrupt, no Exception that code on the way might swallow.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.way_on = ""


class Interrupt:
    """Within it, the first signal is remembered and raised by `check`; a second Ctrl-C stops at once.

    With `at_once` the first one is raised where it comes, for work that has nothing to save.  Signals reach the main
    thread only; in another thread this does nothing.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self.number is not None:
            raise Interrupted(self.number)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.at_once:
            raise Interrupted(number)
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def going_on(way_on: Callable[[bool], str]) -> Iterator[None]:
    """Whoever stops what is within is told how to go on: `way_on(saved)`; a second Ctrl-C did not wait for a save.

    Raises:
        Interrupted: of both; a second Ctrl-C is one too.
    """
    try:
        yield
    except Interrupted as heard:
        heard.way_on = way_on(True)
        raise
    except KeyboardInterrupt:
        at_once = Interrupted(signal.SIGINT)
        at_once.way_on = way_on(False)
        raise at_once from None
