"""What a search has found so far, in one SQLite file: a search that is killed goes on where it was.

A trial is a candidate with a seed and a length.  What it gives is kept under a digest of exactly these, so that a
question that is asked again, or another question that needs the same trial, costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Run
from rankwise.errors import RunFolderError

_TABLES = """
create table if not exists identity (name text primary key, value text not null);
create table if not exists trials (
    key text primary key, step text not null, name text not null, seed integer not null, steps integer not null,
    status text not null, seconds real not null, curve text not null, chosen_by blob, confirmed_by blob
);
"""


@dataclass(frozen=True)
class Candidate:
    """What may be chosen: an adapter and how it learns, under a name for people."""

    name: str
    spec: LoraSpec
    run: Run


@dataclass(frozen=True)
class Trial:
    """A candidate trained with a seed (of its start, its dropout and the order of documents) for so many steps."""

    candidate: Candidate
    seed: int
    steps: int

    @property
    def key(self) -> str:
        asked = {"spec": self.candidate.spec.model_dump(mode="json"), "run": self.candidate.run.model_dump(mode="json")}
        told = json.dumps(asked | {"seed": self.seed, "steps": self.steps}, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True)
class Found:
    """What a trial gave.

    Attributes:
        status: as of `engine.loop.Outcome`.
        seconds: its share of the time that its pack took.
        curve: steps and their training losses.
        choose: summed loss of each document that candidates are chosen by, `[n]`; None where training failed.
        confirm: of those that no choice looks at; None where training failed, was not of full length, or until
            somebody asks (`Trials.confirmed`).
    """

    status: str
    seconds: float
    curve: tuple[tuple[int, float], ...]
    choose: np.ndarray | None = None
    confirm: np.ndarray | None = None


class Study:
    """All trials of a search.

    Args:
        path: of the file; made if need be.
        identity: what must be the same for trials to be comparable: the base, the documents, the shared settings.

    Raises:
        RunFolderError: the file is of another search, or damaged.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        try:
            self.file = sqlite3.connect(path)
            self.file.executescript(_TABLES)
            known = dict(self.file.execute("select name, value from identity"))
        except sqlite3.DatabaseError as error:
            raise RunFolderError(
                f"{path}: not a study that can be read: {error}", hint="choose another --out"
            ) from None
        asked = {name: json.dumps(value, sort_keys=True) for name, value in identity.items()}
        others = [name for name in known if known[name] != asked.get(name)]
        if others:
            self.close()
            raise RunFolderError(
                f"{path}: its trials are of another search: {', '.join(others)} differ", hint="choose another --out"
            )
        with self.file:
            self.file.executemany("insert or ignore into identity values (?, ?)", asked.items())

    def close(self) -> None:
        self.file.close()

    def find(self, trial: Trial) -> Found | None:
        row = self.file.execute(f"select {_FOUND} from trials where key = ?", [trial.key]).fetchone()
        return None if row is None else _read(*row)

    def keep(self, trial: Trial, step: str, found: Found) -> None:
        """Writes what a trial gave; `step` is the question that it was made for."""
        losses = (None if a is None else a.astype(np.float64).tobytes() for a in (found.choose, found.confirm))
        row = (trial.key, step, trial.candidate.name, trial.seed, trial.steps, found.status, found.seconds)
        with self.file:
            self.file.execute(
                "insert or replace into trials values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, json.dumps(found.curve), *losses),
            )

    def confirm(self, trial: Trial, losses: np.ndarray) -> None:
        """Adds what a trial that is known comes to on the documents to confirm on."""
        with self.file:
            told = (losses.astype(np.float64).tobytes(), trial.key)
            self.file.execute("update trials set confirmed_by = ? where key = ?", told)

    def rows(self) -> list[tuple[str, str, int, int, Found]]:
        """Step, name, seed, length and finding of every trial, in the order in which they were made."""
        rows = self.file.execute(f"select step, name, seed, steps, {_FOUND} from trials order by rowid")
        return [(step, name, seed, steps, _read(*found)) for step, name, seed, steps, *found in rows]


_FOUND = "status, seconds, curve, chosen_by, confirmed_by"


def _read(status: str, seconds: float, curve: str, *losses: bytes | None) -> Found:
    choose, confirm = (None if raw is None else np.frombuffer(raw, dtype=np.float64) for raw in losses)
    return Found(status, seconds, tuple((int(step), float(loss)) for step, loss in json.loads(curve)), choose, confirm)
