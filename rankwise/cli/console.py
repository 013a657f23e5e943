"""What a person sees while a job runs: bars with the time they will take, the loss as it falls, lines to read.

Everything goes to standard error; results alone go to standard output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rankwise.texts import json_text, plain

if TYPE_CHECKING:
    from rankwise.jobs.watch import Advance


def print_json(value: Any) -> None:
    print(json_text(value, indent=2))


class Console:
    """A `Watch` on a terminal (or a log file: then a line now and then in place of bars)."""

    def __init__(self) -> None:
        import sys

        from rich.console import Console as Terminal

        self.terminal = Terminal(file=sys.stderr, highlight=False, emoji=False)  # ":b:" in a row is text
        self._bar: Any = None
        self._task: Any = None

    @contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.terminal) as bar:
            task = bar.add_task(title, total=1.0)
            yield lambda share: bar.update(task, completed=min(share, 0.999))
            bar.update(task, completed=1.0)

    def say(self, text: str) -> None:
        self.terminal.print(text, soft_wrap=True)

    def event(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "start":
            self._begin(event)
        elif kind == "step":
            self._step(event)
        elif kind == "evaluation":
            best = ", best so far" if event["best"] else ""
            self.say(f"  step {event['step']}: validation loss {event['loss']:.4f}{best}")
        elif kind == "event":
            rest = {name: value for name, value in event.items() if name not in ("kind", "what", "step")}
            details = plain(json.dumps(rest, ensure_ascii=False))
            self.say(f"  [yellow]step {event['step']}: {event['what']}[/yellow] {details}")
        elif kind == "end":
            self._end()

    def _begin(self, event: dict[str, Any]) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        way = "packed" if event["layout"] == "packed" else "row by row"
        self.say(f"  documents go through the model {way}: {plain(event['reason'])}")
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.terminal,
        )
        self._task = self._bar.add_task("", total=event["steps"], completed=event["step"], loss="–", speed="–")
        self._bar.start()

    def _step(self, event: dict[str, Any]) -> None:
        speed = event["tokens"] / event["seconds"]
        self._bar.update(self._task, completed=event["step"], loss=f"{event['loss']:.4f}", speed=f"{speed:,.0f}")
        if not self.terminal.is_terminal:
            self.say(f"  step {event['step']}: loss {event['loss']:.4f}, {speed:,.0f} tokens/s")

    def _end(self) -> None:
        self._bar.stop()
        self._bar = None

    def close(self) -> None:
        """Takes a bar down that an error left standing."""
        if self._bar is not None:
            self._end()


@contextmanager
def looking_on(quiet: bool) -> Iterator[Any]:
    """The `Watch` for a verb: a console, or nobody where the result is for a machine."""
    from rankwise.jobs.watch import Quiet

    if quiet:
        yield Quiet()
        return
    console = Console()
    try:
        yield console
    finally:
        console.close()
