"""A pack: candidates that train side by side on one base, on the same documents in the same order.

Each has its own optimiser, clipping, schedule and dropout, and what it learns does not depend on who else is there
(`engine/loop.py`).  A pack is a run of its own, with checkpoints: killed, it goes on where it was.  It needs nothing of
the search but what it is told, so that packs can be made anywhere (`Packs`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rankwise.data.examples import Examples
from rankwise.engine.begin import begin
from rankwise.engine.evaluate import measured
from rankwise.engine.folder import RunFolder, held_folder
from rankwise.engine.loop import FAILED, train
from rankwise.engine.run import Loop
from rankwise.errors import TrainingError
from rankwise.search.study import Found, Trial
from rankwise.surgery.bank import Bank

Tell = Callable[[str, float], None]  # what is being done, and how far that is

_APART = 60  # seconds between checkpoints: a pack that is killed loses no more, and a short one writes none


@dataclass(frozen=True)
class Parts:
    """Documents: learnt from, chosen by, and confirmed on, which no choice looks at.

    `frequencies` stand in the place of a base whose head is fresh, as for `evaluate`.
    """

    train: Examples
    choose: Examples
    confirm: Examples
    frequencies: tuple[int, ...] = ()

    @property
    def digests(self) -> list[str]:
        return [part.digest for part in (self.train, self.choose, self.confirm)]


@dataclass(frozen=True)
class Pack:
    """Trials of one seed and one length; `step` is the question that they were made for."""

    step: str
    trials: tuple[Trial, ...]

    @property
    def seed(self) -> int:
        return self.trials[0].seed

    @property
    def steps(self) -> int:
        return self.trials[0].steps

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(trial.key[:8] for trial in self.trials)

    @property
    def title(self) -> str:
        names = ", ".join(trial.candidate.name for trial in self.trials)
        return f"{self.step}: {names} ({self.steps} steps, seed {self.seed})"


class Packs(Protocol):
    """Somewhere packs are made."""

    def made(self, packs: Sequence[Pack], adapters: Path, tell: Tell) -> Iterator[tuple[Pack, list[Found]]]:
        """Each pack with what its trials gave, as they end; what becomes an adapter lies in `adapters` by then.

        Raises:
            RankwiseError: of training, for what no candidate is to blame.
        """
        ...


class Bench:
    """Packs made here, one after the other.

    Args:
        bank: an empty one, on the base.
        documents: of the search.
        loop: how documents go by; its length is that of a full run.
        folder: for checkpoints.
    """

    def __init__(self, bank: Bank, documents: Parts, loop: Loop, folder: Path) -> None:
        self.bank, self.documents, self.loop, self.folder = bank, documents, loop, folder

    def made(self, packs: Sequence[Pack], adapters: Path, tell: Tell) -> Iterator[tuple[Pack, list[Found]]]:
        for pack in packs:
            yield pack, self.train(pack, adapters, tell)
            shutil.rmtree(self.folder / pack.name, ignore_errors=True)  # what it gave has been kept by now

    def train(self, pack: Pack, adapters: Path, tell: Tell) -> list[Found]:
        """What each of its trials gave.

        Of runs of full length and of the search's own seed the adapter is kept, and judged on the documents to confirm
        on when somebody asks (`Trials.confirmed`); those of other seeds are judged on them now, and gone.
        """
        names, began = {f"c{number}": trial for number, trial in enumerate(pack.trials)}, time.monotonic()
        place = self.folder / pack.name
        tell(pack.title, 0.0)
        try:
            for name, trial in names.items():
                begin(self.bank, name, trial.candidate.spec, self.documents.train, pack.seed)
            with held_folder(place, resume=RunFolder(place).begun) as folder:
                statuses = self._learn(pack, list(names), folder, tell)
                curves = _curves(folder.metrics, names)
            losses = self._judge(pack, statuses)
            for name, trial in names.items():
                if statuses[name] == "finished" and self._is_kept(pack):
                    self.bank.save(name, adapters / trial.key)
        finally:
            for name in names:
                if name in self.bank:
                    self.bank.remove(name)
        seconds = (time.monotonic() - began) / len(names)
        return [Found(statuses[name], seconds, tuple(curves[name]), **losses.get(name, {})) for name in names]

    def _is_whole(self, pack: Pack) -> bool:
        return pack.steps == self.loop.max_steps

    def _is_kept(self, pack: Pack) -> bool:
        return self._is_whole(pack) and pack.seed == self.loop.seed

    def _learn(self, pack: Pack, names: list[str], folder: RunFolder, tell: Tell) -> dict[str, str]:
        """How training ended for each: no loss is looked at on the way, so that all end at their last step."""
        statuses, steps = dict.fromkeys(names, "finished"), pack.steps
        pace = {"max_steps": steps, "seed": pack.seed, "evaluate_every": steps}
        pace |= {"save_every": max(1, steps // 4), "save_apart": _APART}

        def observe(event: dict[str, Any]) -> None:
            if event["kind"] == "step":
                tell(pack.title, event["step"] / steps)

        runs = {name: trial.candidate.run for name, trial in zip(names, pack.trials, strict=True)}
        loop = self.loop.model_copy(update=pace)
        try:
            ended = train(
                self.bank, runs, self.documents.train, loop=loop, out=folder, resume=folder.begun, observe=observe
            )
            statuses |= {name: outcome.status for name, outcome in ended.items()}
        except TrainingError:
            failed = {e["adapter"]: e["what"] for e in _events(folder.metrics) if e.get("what") in FAILED}
            if failed.keys() != statuses.keys():
                raise  # not for what the candidates are
            statuses |= failed
        return statuses

    def _judge(self, pack: Pack, statuses: dict[str, str]) -> dict[str, dict[str, np.ndarray]]:
        """Summed losses of each that finished, on the documents to choose by, and on those to confirm on.

        Those that are not finite are none; their status says so from then on.
        """
        good = [name for name, status in statuses.items() if status == "finished"]
        parts = ("choose", "confirm") if self._is_whole(pack) and not self._is_kept(pack) else ("choose",)
        losses: dict[str, dict[str, np.ndarray]] = {name: {} for name in good}
        for which in parts if good else ():
            for name, found in zip(good, measured(self.bank, good, getattr(self.documents, which))[0], strict=True):
                losses[name][which] = found
        for name in good:
            if not all(np.isfinite(found).all() for found in losses[name].values()):
                del losses[name]
                statuses[name] = "not finite"
        return losses


def _events(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _curves(metrics: Path, names: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """Steps and training losses of each adapter."""
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for event in _events(metrics):
        if event["kind"] == "step" and event["loss"] is not None:
            curves[event["adapter"]].append((event["step"], event["loss"]))
    return curves
