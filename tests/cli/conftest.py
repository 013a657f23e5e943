import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import pytest

from rankwise.cli.app import main
from tests.jobs.conftest import _small_world, adapter, run, world  # noqa: F401 (the same small world)


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed, if it is one JSON value and nothing else."""
        return json.loads(self.out)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def rankwise(monkeypatch) -> Callable[..., Ran]:
    """Runs the command's own entry point with these arguments, in this process; `said` is its standard input."""

    def run_here(*arguments: object, said: str | io.StringIO = "", terminal: bool = False) -> Ran:
        monkeypatch.setattr(sys, "argv", ["rankwise", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(said) if isinstance(said, str) else said)
        out, err = (Terminal() if terminal else io.StringIO() for _ in range(2))
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as done:
            main()
        return Ran(int(done.value.code or 0), out.getvalue(), err.getvalue())

    return run_here
