"""A run's folder: one run at a time, metrics appended line by line, nothing overwritten unasked."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from rankwise.errors import RunFolderError

METRICS, CHECKPOINTS, LOCK = "metrics.jsonl", "checkpoints", ".lock"
_LEARNT = ("adapter_config.json", "config.json")  # of an adapter, or of a model that was trained whole
_LAST = "README.md"  # the model card is written when all else is there


class RunFolder:
    """A folder that is held: made, writable and locked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def complete(self) -> bool:
        """Whether a run has left here all that it was to leave."""
        return (self.path / _LAST).exists()

    @property
    def begun(self) -> bool:
        return self.metrics_size() > 0 or self.checkpoints.exists() or self._has_learnt

    @property
    def saved(self) -> bool:
        """Whether there is anything, whole or not, that a run has learnt."""
        return any(self.checkpoints.glob("step-*")) or self._has_learnt

    @property
    def _has_learnt(self) -> bool:
        return any((self.path / name).exists() for name in _LEARNT)

    def write_event(self, event: dict[str, Any]) -> str | None:
        """Appends one line to the metrics; a full disk loses the line, not the run, and its reason is given back.

        JSON has no NaN and no infinity: they are written as null.
        """
        line = json.dumps(_plain(event), ensure_ascii=False, allow_nan=False) + "\n"
        size = self.metrics_size()
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            self.cut_metrics(size)
            return error.strerror
        return None

    def metrics_size(self) -> int:
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Takes back the lines written after a checkpoint, which a resumed run writes again."""
        if self.metrics_size() > size:
            os.truncate(self.metrics, size)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def held_folder(path: Path, *, resume: bool) -> Iterator[RunFolder]:
    """Holds a run folder for the length of a `with`.

    Raises:
        RunFolderError: it cannot be written, another run holds it, it has a run in it already and `resume` is not
            asked for (or has none, and it is), or it has other things in it.
    """
    with locked(path):
        folder = RunFolder(path)
        if folder.begun and not resume:
            raise RunFolderError(
                f"{path}: holds a run already; nothing was overwritten",
                hint="--resume goes on with it, --continue-from trains its adapter further, or choose another --out",
            )
        if resume and not folder.begun:
            raise RunFolderError(f"{path}: no run to resume", hint="leave out --resume to begin one")
        if not folder.begun and any(child.name != LOCK for child in path.iterdir()):
            raise RunFolderError(f"{path}: not empty; nothing was overwritten", hint="choose another --out")
        yield folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A folder that nobody else writes to for the length of a `with`; made if need be.

    Raises:
        RunFolderError: it cannot be written, or another run holds it.
    """
    _make_writable(path)
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderError(
            f"{path}: another run is writing here", hint="wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _make_writable(path: Path) -> None:
    """Found out before a model is loaded, not after hours of training."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise RunFolderError(f"{path}: cannot write here: {error.strerror}", hint="choose another --out") from None
