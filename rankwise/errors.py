"""Every error a person can meet.  Each says what is wrong, where, what was expected, and a way out.

RankwiseError
├── SpecError            settings that are unknown or make no sense together
├── TargetError          targets or patterns that match nothing in the model
├── BankError            an operation the bank refuses: name taken, unknown, merged, closed
├── RouteError           a route that does not fit the batch it meets
├── AdapterFileError     an adapter on disk that is broken, unsafe or of an unknown kind
├── AdapterMismatchError an adapter that was made for another base
├── ModelError           a base model that cannot be found, read or used for this
├── MergeError           a merge whose result differs from base + adapter
├── DataError            rows that cannot be read or hold nothing to learn; lists every problem
├── TrainingError        a run that cannot go on: not finite, diverged
├── RunFolderError       a run folder that is in use, broken, or belongs to another run
├── RequestError         a completion that the serving engine can never give: too long, of no adapter it holds
├── QueueFullError       a completion that has to wait outside: as many as may be are waiting already
└── MissingPackageError  an optional package is needed; says the one command that brings it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class RankwiseError(Exception):
    """The root of all.  `hint` is the way out, shown on a line of its own."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_restore, (type(self), self.message, self.hint))


def _restore(kind: type[RankwiseError], message: str, hint: str) -> RankwiseError:
    return kind(message, hint=hint)


class SpecError(RankwiseError, ValueError): ...


class TargetError(RankwiseError, ValueError): ...


class BankError(RankwiseError, ValueError): ...


class RouteError(RankwiseError, ValueError): ...


class AdapterFileError(RankwiseError, ValueError): ...


class AdapterMismatchError(RankwiseError, ValueError): ...


class ModelError(RankwiseError, ValueError): ...


class MergeError(RankwiseError, RuntimeError): ...


class DataError(RankwiseError, ValueError): ...


class TrainingError(RankwiseError, RuntimeError): ...


class RunFolderError(RankwiseError, RuntimeError): ...


class RequestError(RankwiseError, ValueError): ...


class QueueFullError(RankwiseError, RuntimeError): ...


class MissingPackageError(RankwiseError, ImportError): ...


class RankwiseWarning(UserWarning):
    """Something works, but probably not as meant."""


def listing(problems: Iterable[str], most: int = 20) -> str:
    """One problem a line, indented; past `most` a count of the rest."""
    lines = list(problems)
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  … and {len(lines) - most} more")
    return "\n".join(shown)


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or nothing."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
