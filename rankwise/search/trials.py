"""Trials asked for: what the study knows is told, the rest is trained, as many at once as fit (`search/pack.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rankwise.adapters.adapter import Adapter
from rankwise.engine.evaluate import base_losses, measured
from rankwise.engine.run import Loop
from rankwise.search.pack import Bench, Pack, Packs, Parts, Tell
from rankwise.search.study import Candidate, Found, Study, Trial
from rankwise.surgery.bank import Bank

_LEAST = 10  # steps of a trial


class Trials:
    """Answers with losses, from the study where it knows them, else by training.

    Args:
        bank: an empty one, on the base.
        documents: of the search.
        loop: how documents go by; its length is that of a full run.
        study: what is known.
        folder: for checkpoints and for adapters of full length.
        pack: how many adapters train side by side at most.
        packs: where they are trained; by itself here, one pack after the other.
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
        packs: Packs | None = None,
        tell: Tell | None = None,
    ) -> None:
        self.bank, self.documents, self.loop, self.study, self.folder = bank, documents, loop, study, folder
        self.pack, self.tell = pack, tell or (lambda stage, share: None)
        self.packs = packs or Bench(bank, documents, loop, folder / "packs")
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
            self._base[which] = base_losses(self.bank, examples, self.documents.frequencies)
        return self._base[which]

    def items(self, which: str) -> np.ndarray:
        """Judged items of each document, `[n]`."""
        return getattr(self.documents, which).supervised_counts()

    def steps(self, share: float) -> int:
        """Of a part of a full run; in fewer than a few steps nothing is learnt that says anything."""
        return min(self.loop.max_steps, max(_LEAST, round(share * self.loop.max_steps)))

    def taken(self, share: float) -> float:
        """What of a full run is made where `share` of it is asked for."""
        return self.steps(share) / self.loop.max_steps

    def made(self, step: str, candidates: Sequence[Candidate], seeds: Iterable[int], share: float) -> list[list[Found]]:
        """What each candidate gave with each seed (counted from that of the loop), `[candidates][seeds]`."""
        seeds, steps = list(seeds), self.steps(share)
        table = [[self._trial(candidate, seed, steps) for seed in seeds] for candidate in candidates]
        missing = [[one for one in column if self.study.find(one) is None] for column in zip(*table, strict=True)]
        self._train(
            Pack(step, tuple(trials[at : at + self.pack]))
            for trials in missing
            for at in range(0, len(trials), self.pack)
        )
        for trial in (trial for row in table for trial in row):
            self.asked[trial.key] = self.taken(share)
        found = [[self.study.find(trial) for trial in row] for row in table]
        return [[one for one in row if one is not None] for row in found]

    def confirmed(self, step: str, candidates: Sequence[Candidate], seeds: Iterable[int]) -> list[list[Found]]:
        """As `made`, of full length, and judged on the documents to confirm on, which no choice looks at."""
        seeds = list(seeds)
        found = self.made(step, candidates, seeds, 1.0)
        trials = [self._trial(candidate, seed, self.steps(1.0)) for candidate in candidates for seed in seeds]
        missing = [
            trial
            for trial, one in zip(trials, (one for row in found for one in row), strict=True)
            if one.choose is not None and one.confirm is None
        ]
        for at in range(0, len(missing), self.pack):
            self._confirm(step, missing[at : at + self.pack])
        return self.made(step, candidates, seeds, 1.0) if missing else found

    def _confirm(self, step: str, trials: Sequence[Trial]) -> None:
        """Judges adapters that were kept, all at once; what is not finite stays unknown."""
        self.tell(f"{step}: " + ", ".join(trial.candidate.name for trial in trials) + ", documents to confirm on", 0.0)
        places = [self._kept(step, trial) for trial in trials]  # before the bank holds any: one may have to be trained
        names = [f"c{number}" for number in range(len(trials))]
        try:
            for name, place in zip(names, places, strict=True):
                self.bank.load(name, place, force=True)
            losses = measured(self.bank, names, self.documents.confirm)[0]
        finally:
            for name in names:
                if name in self.bank:
                    self.bank.remove(name)
        for trial, own in zip(trials, losses, strict=True):
            if np.isfinite(own).all():
                self.study.confirm(trial, own)

    def _trial(self, candidate: Candidate, seed: int, steps: int) -> Trial:
        return Trial(candidate, self.loop.seed + seed, steps)

    def adapter(self, step: str, candidate: Candidate, seed: int) -> Adapter:
        """What a candidate has become after a run of full length."""
        self.bank.load("found", self._kept(step, self._trial(candidate, seed, self.steps(1.0))), force=True)
        try:
            return self.bank.adapter("found")
        finally:
            self.bank.remove("found")

    def _kept(self, step: str, trial: Trial) -> Path:
        """Where the adapter lies; trained again, if it is gone."""
        place = self._adapters / trial.key
        if not place.exists():
            self._train([Pack(step, (trial,))])
        return place

    @property
    def _adapters(self) -> Path:
        return self.folder / "adapters"

    def _train(self, packs: Iterable[Pack]) -> None:
        """Trains packs and keeps what they give as it comes."""
        for pack, found in self.packs.made(list(packs), self._adapters, self.tell):
            for trial, one in zip(pack.trials, found, strict=True):
                self.study.keep(trial, pack.step, one)
