"""Metrics to TensorBoard, Weights & Biases, MLflow and the rest, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.errors import MissingPackageError, SpecError

_NUMBERS = ("loss", "lr", "grad_norm", "tokens", "supervised", "seconds")


@contextmanager
def tracked(
    names: Sequence[str], out: Path, settings: list[dict[str, Any]]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what is to be told of every event; with no names that does nothing.

    Raises:
        SpecError: accelerate knows no such tracker.
        MissingPackageError: accelerate, or a tracker's own package, is not installed.
    """
    if not names:
        yield lambda event: None
        return
    check_trackers(names)
    trackers = [_start(name, out, {row["name"]: str(row["value"]) for row in settings}) for name in names]

    def tell(event: dict[str, Any]) -> None:
        if event["kind"] not in ("step", "evaluation"):
            return
        stage = "train" if event["kind"] == "step" else "valid"
        values = {f"{stage}/{name}": event[name] for name in _NUMBERS if name in event}
        for tracker in trackers:
            tracker.log(values, step=event["step"])

    try:
        yield tell
    finally:
        for tracker in trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Nothing, when each of these trackers is there.

    Raises:
        SpecError: accelerate knows no such tracker.
        MissingPackageError: accelerate, or a tracker's own package, is not installed.
    """
    if not names:
        return
    if importlib.util.find_spec("accelerate") is None:
        raise MissingPackageError("--track needs accelerate", hint="pip install 'rankwise[track]'")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise SpecError(f"no tracker {name!r}", hint=f"one of {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in there:
            raise MissingPackageError(f"tracker {name!r} is not installed", hint=f"pip install {name}")


def _start(name: str, out: Path, settings: dict[str, str]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(out.name, logging_dir=str(out / "tracking")) if kind.requires_logging_directory else kind(out.name)
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration(settings)
    return tracker
