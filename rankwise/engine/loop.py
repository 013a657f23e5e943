"""The training loop: one or many adapters of a bank on the same documents, step by step, resumable to the bit.

    step ── documents of the step, cut into micro-batches ──▶ gradients of each adapter, normalised by supervised tokens
         ── each adapter for itself: finite? clip, AdamW ──▶ event
         ── now and then: validation, best so far, checkpoint

Everything a step needs follows from its number (order, learning rate, dropout) or is in the checkpoint.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rankwise.data.examples import Examples
from rankwise.data.order import Order, cut
from rankwise.engine.evaluate import document_losses
from rankwise.engine.folder import RunFolder
from rankwise.engine.forward import Forward
from rankwise.engine.interrupt import Interrupt, Interrupted
from rankwise.engine.run import Loop, Run
from rankwise.engine.state import Checkpoint, check_same, newest_checkpoint, save_checkpoint
from rankwise.engine.tasks.choose import task_for
from rankwise.engine.trainee import Trainee, check_can_learn
from rankwise.engine.weights import check_trained_alone, label
from rankwise.errors import DataError, RunFolderError, SpecError, TrainingError, listing
from rankwise.formats.record import WHOLE
from rankwise.planning.limits import MICRO_TOKENS
from rankwise.surgery.bank import Bank

Observer = Callable[[dict[str, Any]], None]

SKIPS_BEFORE_STOP = 5
FAILED = ("diverged", "not finite")
_STEPS_TO_BE_REACHED = 2
_EVALUATIONS = 10  # a run, where the interval between them is left to us


@dataclass(frozen=True)
class Outcome:
    """How a run ended for one adapter: `finished`, `early`, `diverged` or `not finite`.

    One that failed may have learnt before: it is left at its best validation loss, without one at its last good step.
    """

    status: str
    steps: int
    best_step: int
    best_loss: float | None
    skipped: int

    @property
    def failed(self) -> bool:
        return self.status in FAILED


def train(
    bank: Bank,
    runs: Mapping[Any, Run],
    data: Examples,
    *,
    valid: Examples | None = None,
    loop: Loop | None = None,
    out: RunFolder | None = None,
    resume: bool = False,
    observe: Observer | None = None,
) -> dict[Any, Outcome]:
    """Trains adapters of a bank, or its base.

    What was trained ends at its best validation loss, or without validation at the last step.

    Args:
        bank: holds every adapter that `runs` names.
        runs: adapter → how it learns; None alone trains the base itself, all its weights, in a bank without adapters.
        data, valid: documents to learn from and to judge by; what they are decides what the model is trained for.
        loop: shared settings.
        out: a held run folder for metrics and checkpoints (`held_folder`); None keeps nothing on disk.
        resume: go on from the newest whole checkpoint in `out`.
        observe: is told of every event, as written to metrics.jsonl, and of `start` and `end`.

    Raises:
        DataError: no documents.
        RunFolderError: there is nothing to resume, or it is another run.
        SpecError: `runs` is empty, the model is in float16, or its base cannot be trained itself.
        TrainingError: every adapter failed (diverged, or five steps in a row were not finite) before there was
            anything to keep, or parameters were never reached by a gradient.
        Interrupted: SIGINT or SIGTERM; what was learnt has been saved to `out`.
    """
    if not len(data):
        raise DataError("there is nothing to learn from: no documents")
    if not runs:
        raise SpecError("no adapter to train: `runs` is empty", hint="name each adapter with its Run")
    check_can_learn(bank)
    if None in runs:
        check_trained_alone(bank, list(runs), runs[None])
    training = _Training(bank, runs, data, valid, loop or Loop(), out, observe)
    with closing(training), training.forward, Interrupt() as interrupt:
        if resume:
            training.restore()
        training.go(interrupt)
    outcomes = training.outcomes()
    if not any(training.has_result(name) for name in outcomes):
        raise TrainingError(
            f"training failed:\n{listing(f'{name}: {outcome.status}' for name, outcome in outcomes.items())}",
            hint="lower the learning rate (a third is a good next try), or look at the rows named in the metrics",
        )
    return {training.routed[name]: outcome for name, outcome in outcomes.items()}


class _Training:
    def __init__(
        self,
        bank: Bank,
        runs: Mapping[str | None, Run],
        data: Examples,
        valid: Examples | None,
        loop: Loop,
        folder: RunFolder | None,
        observe: Observer | None,
    ) -> None:
        self.bank, self.data, self.valid, self.loop = bank, data, valid, loop
        self.folder, self.observe = folder, observe
        self.forward = Forward(bank, task_for(data), checkpointing=loop.checkpointing)
        self.lengths, self.supervised = data.lengths(), data.supervised_counts()
        self.order = Order(self.lengths, loop.seed, loop.batch_tokens, loop.batch_documents, loop.replay)
        self.steps = loop.max_steps or self.order.steps(loop.epochs)
        device = bank.model.device.type
        self.micro_tokens = max(1, (loop.micro_tokens or MICRO_TOKENS.get(device, 8192)) // len(runs))
        self.evaluate_every = loop.evaluate_every or max(1, round(self.steps / _EVALUATIONS))
        self.save_every = loop.save_every or self.evaluate_every
        self.base = bank.base_fingerprint  # before a step changes it
        self.routed = {label(name): name for name in runs}
        self.trainees = {label(n): Trainee(bank, n, run, self.steps, loop.seed) for n, run in runs.items()}
        self.status = dict.fromkeys(self.trainees, "learning")
        self.done = self.begun = 0  # steps; those made before this process
        self.judged = -1  # the step that was last judged
        self.saved = time.monotonic()  # when the last checkpoint was written, or all began

    def close(self) -> None:
        for trainee in self.trainees.values():
            trainee.close()

    # ── the course of a run ──────────────────────────────────────────────────────────────────────────────────────

    def go(self, interrupt: Interrupt) -> None:
        layout = {"layout": self.forward.layout, "reason": self.forward.reason}
        self.show({"kind": "start", "step": self.done, "steps": self.steps, **layout})
        try:
            while True:
                at_end = self.done == self.steps or not self.active
                if self.judged != self.done and (self.done % self.evaluate_every == 0 or at_end):
                    self.judge(interrupt)
                if self.done and (self.done % self.save_every == 0 or at_end) and self.is_due:
                    self.save()
                if at_end or not self.active:
                    break
                self.step(interrupt)
        except Interrupted:
            for trainee in self.trainees.values():
                trainee.forget()  # a half-gathered gradient is not part of any step
            self.save()
            raise
        finally:
            self.show({"kind": "end", "step": self.done})
        for name in self.active:
            self.status[name] = "finished"
        for trainee in self.trainees.values():
            trainee.restore_best()

    @property
    def active(self) -> list[str]:
        return [name for name, status in self.status.items() if status == "learning"]

    def step(self, interrupt: Interrupt) -> None:
        """One optimiser step of every adapter that is still learning."""
        begun, names = time.perf_counter(), self.active
        epoch, documents = self.order.step(self.done)
        found = self.gather(documents, names, interrupt)
        tokens, supervised = int(self.lengths[documents].sum()), int(self.supervised[documents].sum())
        shared = {"step": self.done + 1, "epoch": epoch, "tokens": tokens, "supervised": supervised}
        for name, losses in found.items():
            trainee = self.trainees[name]
            loss = float(losses.sum() / supervised)
            lr = trainee.run.lr_at(self.done, self.steps)
            norm = trainee.step(lr) if np.isfinite(loss) else None
            self.prune(name)
            if norm is None:
                trainee.forget()
                self.skip(name, documents, losses)
                continue
            trainee.guard.take(loss)
            seconds = time.perf_counter() - begun
            self.tell(
                {"kind": "step", "adapter": name, "loss": loss, "lr": lr, "grad_norm": norm, "seconds": seconds}
                | shared
                | trainee.pruned()
            )
            if trainee.guard.diverged:
                self.stop(name, "diverged")
        self.done += 1
        if self.done == min(self.begun + _STEPS_TO_BE_REACHED, self.steps):
            self.check_reached(self.active)

    def prune(self, name: str) -> None:
        """Of form `adalora`; the final ranks are an event."""
        allocator = self.trainees[name].allocator
        if allocator is None or allocator.settled:
            return
        self.trainees[name].prune(self.done + 1)
        if allocator.settled:
            sites = {f"rank {rank}": count for rank, count in sorted(Counter(allocator.ranks.values()).items())}
            step = {"step": self.done + 1, "adapter": name}
            self.tell({"kind": "event", "what": "ranks are final", **step, "sites": sites})

    def gather(self, documents: np.ndarray, names: list[str], interrupt: Interrupt) -> dict[str, np.ndarray]:
        """Gradients of one step; the summed loss of each document, by adapter.

        Every adapter sees the same micro-batches side by side in one stream, and each document weighs the same
        whatever micro-batch it is in: the step's loss is the mean over its supervised tokens.
        """
        lessons = [(name, lesson) for name in names for lesson in self.trainees[name].lessons(self.done, documents)]
        losses = {name: np.zeros(len(documents)) for name in names}
        place = {int(document): i for i, document in enumerate(documents)}
        weight = 1.0 / self.supervised[documents].sum()
        data, padded = self.data.drawn(self.done), self.forward.layout == "rows"
        for number, micro in enumerate(cut(documents, self.lengths, self.micro_tokens, padded=padded)):
            interrupt.check()
            taken = [(name, own) for name, lesson in lessons if len((own := lesson.among(micro)).documents)]
            laid = np.concatenate([own.documents for _, own in taken])
            runs = [(own.way, len(own.documents)) for _, own in taken]
            tick = (self.done << 20) + number
            found = self.forward.learn(data, laid, runs, np.full(len(laid), weight), tick)
            parts = np.split(found.documents, np.cumsum([count for _, count in runs])[:-1])
            for (name, own), part in zip(taken, parts, strict=True):
                losses[name][[place[int(document)] for document in own.documents]] = part
        return losses

    def judge(self, interrupt: Interrupt) -> None:
        """Validation: the loss of each adapter, whether it is a new best, whether it is time to stop.

        Before the first step it tells where training begins, which is no candidate for the best.
        """
        names = self.active
        if self.valid is None or not names:
            return
        asked = [self.routed[name] for name in names]
        losses = document_losses(self.forward, self.valid, asked, self.micro_tokens, lambda done, of: interrupt.check())
        tokens = self.valid.supervised_counts().sum()
        for name, row in zip(names, losses, strict=True):
            loss, trainee = float(row.sum() / tokens), self.trainees[name]
            if not np.isfinite(loss):
                self.stop(name, "diverged", message=f"the validation loss is {loss}")
                continue
            best = self.done > 0 and trainee.judge(loss, self.done)
            event = {"kind": "evaluation", "step": self.done, "adapter": name, "loss": loss}
            self.tell({**event, "documents": len(self.valid), "best": best})
            if self.loop.patience and trainee.stale >= self.loop.patience:
                self.stop(name, "early")
        self.judged = self.done

    # ── when something is wrong ──────────────────────────────────────────────────────────────────────────────────

    def skip(self, name: str, documents: np.ndarray, losses: np.ndarray) -> None:
        """A step whose numbers are not finite changes nothing, is counted, and its rows are named."""
        guard = self.trainees[name].guard
        guard.skip()
        bad = documents[~np.isfinite(losses)]
        rows = [self.data.origin(int(i)) for i in (bad if len(bad) else documents)]
        self.tell({"kind": "event", "what": "skipped", "step": self.done + 1, "adapter": name, "rows": rows[:20]})
        if guard.in_a_row >= SKIPS_BEFORE_STOP:
            self.stop(name, "not finite")

    def stop(self, name: str, status: str, **why: str) -> None:
        self.status[name] = status
        self.trainees[name].retire()
        self.tell({"kind": "event", "what": status, "step": self.done, "adapter": name, **why})

    def check_reached(self, names: list[str]) -> None:
        """A site that is never called would be saved as it began, and the run would look like a success."""
        unreached = [f"{name}: {path}" for name in names for path in self.trainees[name].unreached]
        if unreached and WHOLE in names:  # nobody has named them: what no pass uses stays as it is
            told = {"step": self.done, "adapter": WHOLE, "weights": self.trainees[WHOLE].unreached[:20]}
            self.tell({"kind": "event", "what": "weights that no gradient reaches", **told})
        elif unreached:
            raise TrainingError(
                f"{len(unreached)} parameters train nothing, no gradient has reached them:\n{listing(unreached)}",
                hint="leave their modules out of the adapter's targets",
            )

    def tell(self, event: dict[str, Any]) -> None:
        """For the record and for whoever looks on."""
        lost = self.folder.write_event(event) if self.folder is not None else None
        self.show(event)
        if lost is not None:
            self.show({"kind": "event", "what": "line of metrics lost", "step": self.done, "message": lost})

    def show(self, event: dict[str, Any]) -> None:
        if self.observe is not None:
            self.observe(event)

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is long enough ago."""
        return time.monotonic() - self.saved >= self.loop.save_apart

    def save(self) -> None:
        """A checkpoint of this moment; a disk that is full loses the checkpoint, not the run."""
        if self.folder is None:
            return
        numbers = {
            "identity": self.identity(),
            "status": self.status,
            "judged": self.judged,
            "metrics_bytes": self.folder.metrics_size(),
            "trainees": {name: trainee.numbers() for name, trainee in self.trainees.items()},
        }
        tensors = {f"adapter-{name}": trainee.tensors() for name, trainee in self.trainees.items()}
        tensors["rng"] = {"cpu": torch.get_rng_state()}
        try:
            save_checkpoint(self.folder.checkpoints, Checkpoint(self.done, numbers, tensors), self.loop.keep)
        except RunFolderError as error:
            self.tell({"kind": "event", "what": "checkpoint failed", "step": self.done, "message": str(error)})
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Takes up the newest whole checkpoint; a run that was stopped before its first one begins again.

        A run that has made its last step but was stopped before its folder was complete has its weights brought back.

        Raises:
            RunFolderError: all are damaged, it belongs to other settings or data (all listed), or all is done.
        """
        if self.folder is None:
            raise RunFolderError("there is no run folder to resume from", hint="say which with `out`")
        if not self.folder.saved:
            self.folder.cut_metrics(0)
            self.tell({"kind": "event", "what": "stopped before its first checkpoint, begun again", "step": 0})
            return
        checkpoint, problems = newest_checkpoint(self.folder.checkpoints)
        check_same(checkpoint.numbers["identity"], self.identity())
        self.status, self.done, self.begun = checkpoint.numbers["status"], checkpoint.step, checkpoint.step
        self.judged = checkpoint.numbers["judged"]
        if self.folder.complete and (self.done >= self.steps or not self.active):
            raise RunFolderError(
                f"{self.folder.path}: nothing to resume, the run is finished ({self.done} of {self.steps} steps)",
                hint="--continue-from trains its adapter further in a new folder",
            )
        for name, trainee in self.trainees.items():
            trainee.restore(dict(checkpoint.tensors[f"adapter-{name}"]), checkpoint.numbers["trainees"][name])
        torch.set_rng_state(checkpoint.tensors["rng"]["cpu"])
        self.folder.cut_metrics(checkpoint.numbers["metrics_bytes"])
        for problem in problems:
            self.tell(
                {"kind": "event", "what": "damaged checkpoint passed over", "step": self.done, "message": problem}
            )

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        return {
            "base": self.base,
            "number format": str(self.bank.model.dtype),
            "training documents": self.data.digest,
            "validation documents": self.valid.digest if self.valid is not None else None,
            "layout": self.forward.layout,
            "micro_tokens": self.micro_tokens,
            "steps": self.steps,
            "loop": self.loop.model_dump(mode="json"),
            "adapters": {name: trainee.identity() for name, trainee in self.trainees.items()},
        }

    def has_result(self, name: str) -> bool:
        """Whether there is anything to keep: it came through, or had a finite validation or step before it failed."""
        trainee = self.trainees[name]
        failed = self.status[name] in FAILED
        return not failed or trainee.best is not None or trainee.guard.first is not None

    def outcomes(self) -> dict[str, Outcome]:
        found = {}
        for name, trainee in self.trainees.items():
            judged = trainee.best is not None
            found[name] = Outcome(
                status=self.status[name],
                steps=self.done,
                best_step=trainee.best_step if judged else self.done,
                best_loss=trainee.best_loss if judged else None,
                skipped=trainee.guard.skipped,
            )
        return found
