"""What a search stands on: the model, the documents in their three parts, and the length of a full run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.data.order import Order
from rankwise.data.split import split
from rankwise.errors import DataError
from rankwise.jobs.documents import Documents, counts, read_documents
from rankwise.jobs.evaluate import frequencies
from rankwise.jobs.machine import available_bytes, machine_facts, versions
from rankwise.jobs.plan import predicted_training
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.subject import Subject, subject_of
from rankwise.jobs.watch import Watch
from rankwise.search.pack import Parts
from rankwise.surgery.bank import Bank

HELD_BACK = 0.25  # without a validation file: half of it chooses, half of it confirms
_MOST = 8  # adapters side by side, by itself: more gain nothing where a step has a thousand tokens
_FREE = 0.8  # of the memory that is left
_LARGEST = 64  # rank, where nobody has said which ranks are tried
_PROBE = "probe"


@dataclass(frozen=True)
class Ground:
    """What a search stands on.

    Attributes:
        request: with the length of a full run in steps, and with what is held back.
        order: of the documents that are learnt from.
    """

    request: TrainRequest
    subject: Subject
    parts: Parts
    order: Order

    def identity(self, bank: Bank) -> dict[str, Any]:
        """What must be the same for trials to be comparable, wherever they are made."""
        return {
            "base": bank.base_fingerprint,
            "documents": self.parts.digests,
            "shared settings": self.request.loop.model_dump(mode="json", exclude={"micro_tokens", "checkpointing"}),
        }

    def facts(self) -> dict[str, Any]:
        """For search.json."""
        tokens, steps = self.parts.train.lengths(), self.request.max_steps
        base = self.subject.base
        return {
            "schema": 1,
            "task": self.request.task,
            "machine": machine_facts(base.device, base.precision),
            "versions": versions(),
            "data": {name: counts(getattr(self.parts, name)) for name in ("train", "choose", "confirm")},
            "full_run": {"steps": steps, "tokens": sum(int(tokens[self.order.step(i)[1]].sum()) for i in range(steps))},
        }

    def fitting(self, bank: Bank, ranks: tuple[int, ...]) -> tuple[int, str]:
        """How many adapters of the largest of these ranks train side by side, and why no more.

        A step of several takes the activations of one, whose micro-batches it shares out; what each has for itself are
        its weights, their gradients and the optimiser's moments.
        """
        rank = max([self.request.rank, *(ranks or (_LARGEST,))])
        spec = self.request.spec_with(self.subject.base.fresh)
        bank.add(_PROBE, spec.model_copy(update={"rank": rank, "init": "kaiming", "form": "lora"}))
        try:
            memory = predicted_training(self.request, self.subject.base, bank, self.parts.train)
            parameters = bank.adapter(_PROBE).parameter_count()
        finally:
            bank.remove(_PROBE)
        free = int(_FREE * available_bytes(bank.model.device))
        each = 16 * parameters if memory is None else memory.adapters + memory.gradients + memory.optimiser
        alone = 0 if memory is None else memory.step - memory.weights - memory.process
        count = max(1, 1 + (free - max(alone, each)) // max(each, 1))
        said = f"an adapter of rank {rank} more takes {each / 1e6:,.0f} MB of the {free / 1e6:,.0f} MB that may be used"
        if count >= _MOST:
            return _MOST, f"{said}; more than {_MOST} gain nothing"
        return count, said


def ground_of(request: TrainRequest, watch: Watch) -> Ground:
    """Loads the model and reads the documents.

    Raises:
        RankwiseError: of loading and reading.
    """
    if request.valid is None and request.hold_back is None:
        request = TrainRequest(**request.model_dump(exclude_unset=True) | {"hold_back": HELD_BACK})
    subject = subject_of(request, watch)
    documents = read_documents(request, subject.reader, watch)
    parts = _parts(documents, request.seed, frequencies(subject.base, subject.classes))
    order = Order(parts.train.lengths(), request.seed, request.batch_tokens, request.batch_documents)
    steps = request.max_steps or order.steps(request.epochs)
    settled = request.model_dump(exclude_unset=True) | {"max_steps": steps, "evaluate_every": steps}
    return Ground(TrainRequest(**settled), subject, parts, order)


def _parts(documents: Documents, seed: int, shares: Sequence[int]) -> Parts:
    """A file for tests confirms; without one half of the documents to judge by does."""
    choose, confirm = documents.valid, documents.test
    if confirm is choose:
        choose, confirm = split(choose, 0.5, seed)
    if min(len(choose), len(confirm)) < 2:
        raise DataError(
            f"{len(choose)} documents to choose by and {len(confirm)} to confirm on: an interval needs two",
            hint="give --valid and --test, or more rows",
        )
    return Parts(documents.train, choose, confirm, tuple(shares))
