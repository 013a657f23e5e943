"""Trials made: candidates trained side by side on one base, on the same documents in the same order.

Trials of one seed and one length go through the model together, as many as fit (a pack); each has its own optimiser,
clipping, schedule and dropout, and what it learns does not depend on who else is there (`engine/loop.py`).  A pack is a
run of its own, with checkpoints: killed, it goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.adapters.adapter import Adapter
from rankwise.data.examples import Examples
from rankwise.engine.begin import begin
from rankwise.engine.evaluate import base_losses, measured
from rankwise.engine.folder import RunFolder, held_folder
from rankwise.engine.loop import FAILED, train
from rankwise.engine.run import Loop
from rankwise.errors import TrainingError
from rankwise.search.study import Candidate, Found, Study, Trial
from rankwise.surgery.bank import Bank

_LEAST = 10  # steps of a trial
Tell = Callable[[str, float], None]  # what is being done, and how far that is


@dataclass(frozen=True)
class Parts:
    """Documents: learnt from, chosen by, and confirmed on, which no choice looks at."""

    train: Examples
    choose: Examples
    confirm: Examples


class Trials:
    """Answers with losses, from the study where it knows them, else by training.

    Args:
        bank: an empty one, on the base.
        documents: of the search.
        loop: how documents go by; its length is that of a full run.
        study: what is known.
        folder: for checkpoints and for adapters of full length.
        pack: how many adapters train side by side at most.
        frequencies: what stands in the place of a base whose head is fresh, as for `evaluate`.
        tell: is told what is being done.
    """

    def __init__(
        self,
        bank: Bank,
        documents: Parts,
        loop: Loop,
        study: Study,
        folder: Path,
        *,
        pack: int,
        frequencies: Sequence[int] = (),
        tell: Tell | None = None,
    ) -> None:
        self.bank, self.documents, self.loop, self.study, self.folder = bank, documents, loop, study, folder
        self.pack, self.frequencies, self.tell = pack, tuple(frequencies), tell or (lambda stage, share: None)
        self.asked: dict[str, float] = {}  # key → share of a full run, of all that this search rests on
        self._base: dict[str, np.ndarray] = {}

    # ── what can be asked ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def cost(self) -> float:
        """Of all trials that were asked for, in runs of full length."""
        return sum(self.asked.values())

    def base(self, which: str) -> np.ndarray:
        """Summed losses of the base, `[n]`, on the documents to `choose` by or to `confirm` on."""
        if which not in self._base:
            examples = getattr(self.documents, which)
            self.tell(f"measuring the base, documents to {which} by", 0.0)
            self._base[which] = base_losses(self.bank, examples, self.frequencies)
        return self._base[which]

    def items(self, which: str) -> np.ndarray:
        """Judged items of each document, `[n]`."""
        return getattr(self.documents, which).supervised_counts()

    def steps(self, share: float) -> int:
        """Of a part of a full run; in fewer than a few steps nothing is learnt that says anything."""
        return min(self.loop.max_steps, max(_LEAST, round(share * self.loop.max_steps)))

    def made(self, step: str, candidates: Sequence[Candidate], seeds: Iterable[int], share: float) -> list[list[Found]]:
        """What each candidate gave with each seed (counted from that of the loop), `[candidates][seeds]`."""
        seeds, steps = list(seeds), self.steps(share)
        table = [[self._trial(candidate, seed, steps) for seed in seeds] for candidate in candidates]
        for number in range(len(seeds)):
            missing = [row[number] for row in table if self.study.find(row[number]) is None]
            for at in range(0, len(missing), self.pack):
                self._train(step, missing[at : at + self.pack])
        for trial in (trial for row in table for trial in row):
            self.asked[trial.key] = steps / self.loop.max_steps
        found = [[self.study.find(trial) for trial in row] for row in table]
        return [[one for one in row if one is not None] for row in found]

    def _trial(self, candidate: Candidate, seed: int, steps: int) -> Trial:
        return Trial(candidate, self.loop.seed + seed, steps)

    def adapter(self, step: str, candidate: Candidate, seed: int) -> Adapter:
        """What a candidate has become after a run of full length."""
        trial = self._trial(candidate, seed, self.steps(1.0))
        place = self._adapters / trial.key
        if not place.exists():
            self._train(step, [trial])
        self.bank.load("found", place, force=True)
        try:
            return self.bank.adapter("found")
        finally:
            self.bank.remove("found")

    # ── a pack ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _adapters(self) -> Path:
        return self.folder / "adapters"

    def _train(self, step: str, trials: Sequence[Trial]) -> None:
        """Trains some together, measures them, and keeps what was found."""
        names = {f"c{number}": trial for number, trial in enumerate(trials)}
        seed, steps, began = trials[0].seed, trials[0].steps, time.monotonic()
        place = self.folder / "packs" / "-".join(trial.key[:8] for trial in trials)
        title = f"{step}: {', '.join(trial.candidate.name for trial in trials)} ({steps} steps, seed {seed})"
        self.tell(title, 0.0)
        try:
            for name, trial in names.items():
                begin(self.bank, name, trial.candidate.spec, self.documents.train, seed)
            with held_folder(place, resume=RunFolder(place).begun) as folder:
                statuses = self._learn(names, seed, steps, folder, title)
                curves = _curves(folder.metrics, names)
            self._judge(step, names, statuses, curves, time.monotonic() - began)
        finally:
            for name in names:
                if name in self.bank:
                    self.bank.remove(name)
        shutil.rmtree(place, ignore_errors=True)

    def _learn(self, names: dict[str, Trial], seed: int, steps: int, folder: RunFolder, title: str) -> dict[str, str]:
        """How training ended for each: no loss is looked at on the way, so that all end at their last step."""
        statuses = dict.fromkeys(names, "finished")
        pace = {"max_steps": steps, "seed": seed, "evaluate_every": steps, "save_every": max(1, steps // 4)}

        def observe(event: dict[str, Any]) -> None:
            if event["kind"] == "step":
                self.tell(title, event["step"] / steps)

        runs = {name: trial.candidate.run for name, trial in names.items()}
        loop = self.loop.model_copy(update=pace)
        try:
            ended = train(
                self.bank, runs, self.documents.train, loop=loop, out=folder, resume=folder.begun, observe=observe
            )
            statuses |= {name: outcome.status for name, outcome in ended.items()}
        except TrainingError:
            failed = {e["adapter"]: e["what"] for e in _events(folder.metrics) if e.get("what") in FAILED}
            if failed.keys() != names.keys():
                raise  # not for what the candidates are
            statuses |= failed
        return statuses

    def _judge(
        self,
        step: str,
        names: dict[str, Trial],
        statuses: dict[str, str],
        curves: dict[str, list[tuple[int, float]]],
        seconds: float,
    ) -> None:
        whole = next(iter(names.values())).steps == self.loop.max_steps
        good = [name for name, status in statuses.items() if status == "finished"]
        losses: dict[str, np.ndarray] = {}
        for which in ("choose", "confirm") if whole else ("choose",):
            losses[which] = measured(self.bank, good, getattr(self.documents, which))[0] if good else np.zeros((0, 0))
        for name, trial in names.items():
            own = {which: found[good.index(name)] for which, found in losses.items()} if name in good else {}
            status = statuses[name]
            if not all(np.isfinite(found).all() for found in own.values()):
                own, status = {}, "not finite"
            if whole and own and trial.seed == self.loop.seed:  # those of other seeds are judged, and not used
                self.bank.save(name, self._adapters / trial.key)
            self.study.keep(trial, step, Found(status, seconds / len(names), tuple(curves[name]), **own))


def _events(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _curves(metrics: Path, names: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """Steps and training losses of each adapter."""
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for event in _events(metrics):
        if event["kind"] == "step" and event["loss"] is not None:
            curves[event["adapter"]].append((event["step"], event["loss"]))
    return curves
