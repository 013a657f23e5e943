"""Checkpoints, and the start they all go back to: whole or not there.

A checkpoint is built in a folder beside, flushed to the disk, given a manifest with the size and SHA-256 of each file,
and only then renamed into place.  Resuming takes the newest whose manifest holds true.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.errors import RunFolderError, listing

SCHEMA = 1
_MANIFEST, _NUMBERS, _START = "manifest.json", "state.json", "start"


@dataclass(frozen=True)
class Checkpoint:
    """All a run needs to go on: numbers, and tensors by group (one file each)."""

    step: int
    numbers: dict[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def save_checkpoint(parent: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `step-NNNNNN` and removes all but the newest `keep`.

    A step's whole checkpoint is never written again: what a run knows follows from its step, and taking the old one
    away first would leave a moment without any.

    Raises:
        RunFolderError: the disk is full or broken; older checkpoints are untouched.
    """
    place = parent / f"step-{checkpoint.step:06d}"
    if not place.exists() or _damage(place) is not None:
        _write(place, checkpoint)
    others = [other for other in _places(parent) if other != place]  # newer ones among them are damaged
    for old in others[keep - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def _write(place: Path, checkpoint: Checkpoint) -> None:
    beside = place.with_name(f".{place.name}.part")
    for rest in place.parent.glob(".*.part"):  # of a run that was killed while it wrote
        shutil.rmtree(rest, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for group, tensors in checkpoint.tensors.items():
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside / f"{group}.safetensors"
            )
        numbers = {"schema": SCHEMA, "step": checkpoint.step, **checkpoint.numbers}
        (beside / _NUMBERS).write_text(json.dumps(numbers, allow_nan=False), encoding="utf-8")
        files = {path.name: _facts(path) for path in sorted(beside.iterdir())}
        (beside / _MANIFEST).write_text(json.dumps({"schema": SCHEMA, "files": files}), encoding="utf-8")
        _flush(beside)
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        needed = sum(t.numel() * t.element_size() for group in checkpoint.tensors.values() for t in group.values())
        shutil.rmtree(beside, ignore_errors=True)
        free = shutil.disk_usage(place.parent.parent).free
        reason = getattr(error, "strerror", None) or error
        raise RunFolderError(
            f"{place}: checkpoint not written: {reason}; it takes {needed:,} bytes, {free:,} are free",
            hint="make room; the older checkpoints are intact",
        ) from None


def newest_checkpoint(parent: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with newer ones.

    Raises:
        RunFolderError: there is none.
    """
    problems: list[str] = []
    for place in _places(parent):
        problem = _damage(place)
        if problem is None:
            return _read(place), problems
        problems.append(problem)
    found = "; ".join(problems) or "there is none"
    raise RunFolderError(f"{parent}: no checkpoint to resume from: {found}", hint="begin again with another --out")


def save_start(parent: Path, start: Checkpoint) -> None:
    """Writes how a run began, once, beside its checkpoints.

    Raises:
        RunFolderError: the disk is full or broken.
    """
    _write(parent / _START, start)


def read_start(parent: Path) -> tuple[Checkpoint | None, str | None]:
    """How a run began, if that was kept and is whole; and what is wrong with it."""
    place = parent / _START
    if not place.exists():
        return None, None
    problem = _damage(place)
    return (_read(place), None) if problem is None else (None, problem)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """That a checkpoint is of the run that wants to go on from it.

    Raises:
        RunFolderError: it is not; every setting that differs is listed.
    """
    different = [f"{name}: was {old!r}, is {new!r}" for name, old, new in _differences(before, now)]
    if different:
        raise RunFolderError(
            f"the checkpoint belongs to a run with other settings:\n{listing(different)}",
            hint="resume with the same command; to change settings, train further with --continue-from",
        )


def _differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{path}.{k}" if path else str(k))]
    return [] if before == now else [(path, before, now)]


def _places(parent: Path) -> list[Path]:
    """Checkpoints, newest first."""
    places = [place for place in parent.glob("step-*") if place.name.removeprefix("step-").isdigit()]
    return sorted(places, key=lambda place: int(place.name.removeprefix("step-")), reverse=True)


def _damage(place: Path) -> str | None:
    try:
        manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            return f"{place.name}: schema {manifest['schema']}, this version reads {SCHEMA}"
        for name, facts in manifest["files"].items():
            if _facts(place / name) != facts:
                return f"{place.name}: {name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{place.name}: {error}"
    return None


def _read(place: Path) -> Checkpoint:
    numbers = json.loads((place / _NUMBERS).read_text(encoding="utf-8"))
    tensors = {path.stem: load_file(path) for path in place.glob("*.safetensors")}
    return Checkpoint(numbers["step"], numbers, tensors)


def _facts(path: Path) -> dict[str, Any]:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return {"bytes": path.stat().st_size, "sha256": sha.hexdigest()}


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
