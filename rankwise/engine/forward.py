"""One pass of routed documents through a bank's model: how it goes is found out once, and proved on a probe.

Packed where the task and the model's attention allow it, row by row where they do not; through the output layer in
chunks where the model's logits are that layer of what it is given, through the model's own logits where they are more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rankwise.data.examples import Examples
from rankwise.engine.agree import agree
from rankwise.engine.attention import Rows, UnpackableError, attending, streaming
from rankwise.engine.batch import Batch
from rankwise.engine.blocks import fused_blocks
from rankwise.engine.head import Head, frozen_head_loss, measured_losses, trained_head_loss
from rankwise.engine.outlet import NoOutletError, Outlet
from rankwise.engine.tasks.causal import CausalLM
from rankwise.engine.tasks.task import Documents, Layout, Task
from rankwise.engine.tasks.task import Way as Course
from rankwise.errors import ModelError, RankwiseWarning
from rankwise.kernels.attention import Spans
from rankwise.kernels.heap import keep_freed_memory
from rankwise.surgery.bank import Bank
from rankwise.surgery.layer import AdaptedLayer, Stand, name_of
from rankwise.surgery.routing import Route, Router, Way, members_of
from rankwise.surgery.tokens import TokenHead

Runs = Sequence[tuple[Way, int]]  # adapter, or part of one (None: the base), and how many documents it takes, in order


@dataclass(frozen=True)
class Losses:
    """What a pass found.

    Attributes:
        documents: float64 `[D]`, summed negative log-likelihood of the judged items of each document, in nats.
        predicted: int64 `[D]`, the class that each is likeliest of; None where a document has no class.
    """

    documents: np.ndarray
    predicted: np.ndarray | None = None


class Forward:
    """The engine's hold on a model, for the length of a `with`.

    Args:
        bank: whose model.
        task: what kind of examples will go through (`engine/tasks`).
        checkpointing: compute blocks again in the backward pass.

    Attributes:
        layout: `packed` streams or padded `rows`, and `reason` why.
        fused: how many blocks run on compiled kernels.

    Raises:
        ModelError: the model is not made for the task, or none of the ways agrees with the model itself.
    """

    def __init__(self, bank: Bank, task: type[Task] = CausalLM, *, checkpointing: bool = False) -> None:
        self.bank, self.model = bank, bank.model
        self.task = task(bank.model)
        self.checkpointing = checkpointing
        self.layout: Layout = "packed"
        self.reason = ""
        self.fused = 0
        self._outlet = Outlet(self.model)
        self._held = ExitStack()

    def __enter__(self) -> Forward:
        keep_freed_memory()
        with ExitStack() as held:
            self._take_hold(held)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _take_hold(self, held: ExitStack) -> None:
        held.enter_context(evaluating(self.model))
        held.enter_context(self.bank.use(None))
        want = _Probe.of(self.task)
        self.fused = held.enter_context(fused_blocks(self.model))
        held.enter_context(_compiled(self.bank.router))
        refusals: dict[Layout, str] = {}
        for way in self.task.ways():
            refusal = self._try(held, way, want)
            if refusal is None:
                break
            refusals.setdefault(way.layout, refusal)
        else:
            raise ModelError(f"{type(self.model).__name__}: {refusals['rows']}", hint=self.task.hint)
        self.reason = refusals.get("packed", self.task.by_rows) if self.layout == "rows" else _PACKED
        if self.checkpointing:
            held.enter_context(_checkpointing(self.model))

    def _try(self, held: ExitStack, way: Course, want: _Probe) -> str | None:
        """Takes a way if it agrees with the model itself; else says why not, and everything is as before."""
        self.layout, self._outlet = way.layout, way.outlet
        try:
            with ExitStack() as trial:
                trial.enter_context(way.outlet.opened())
                if way.attention:
                    trial.enter_context(attending(self.model))
                self._prove(want)
                held.push(trial.pop_all())
        except (UnpackableError, NoOutletError) as refusal:
            return str(refusal)
        except (RuntimeError, TypeError, ValueError) as error:  # a model may break where it meets what it does not know
            said = (str(error) or "no reason given").splitlines()[0]
            stream = "a packed stream ends" if way.layout == "packed" else "padded rows end"
            return f"{stream} in a {type(error).__name__}: {said}"
        return None

    # ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────

    def learn(self, examples: Examples, documents: Documents, runs: Runs, weights: np.ndarray, tick: int) -> Losses:
        """Forward and backward: gradients of `Σ weights[i] · loss of document i` are added to the adapters' own.

        `weights` is float `[D]`; `tick` numbers the pass for dropout.
        """
        batch = self._laid(examples, documents, runs)
        with self._routed(batch, runs, tick), _dropping(self.model):
            features, targets = self._features(batch)
            each = torch.as_tensor(weights[batch.owners], dtype=torch.float32, device=features.device)
            loss, losses = self._loss(features, targets, each, batch, runs)
            if loss.requires_grad:
                loss.backward()
        return Losses(_per_document(losses, batch))

    @torch.no_grad()
    def measure(self, examples: Examples, documents: Documents, runs: Runs) -> Losses:
        """Forward alone."""
        batch = self._laid(examples, documents, runs)
        with self._routed(batch, runs, tick=0):
            features, targets = self._features(batch)
            parts = [
                measured_losses(features[items], self._logits_of(name), self._classes(features), targets[items])
                for items, name in _judged_runs(batch, runs)
            ]
        predicted = features.argmax(-1).cpu().numpy() if self.task.classifies else None
        return Losses(_per_document(torch.cat(parts), batch), predicted)

    @property
    def own_logits(self) -> bool:
        """Whether the model's own logits are taken, and not what its head is given."""
        return self._outlet.head is None

    @torch.no_grad()
    def look(self, examples: Examples, documents: Documents, name: str, see: Callable[[Tensor, int], None]) -> Tensor:
        """Forward through one adapter, for somebody who watches the layers; gives what the head takes, `[S, H]`.

        `see` is told beforehand which rows `[S]` of their inputs, leading dimensions flattened, predict supervised
        tokens, and how many rows there are.
        """
        runs = [(name, len(documents))]
        batch = self._laid(examples, documents, runs)
        see(torch.as_tensor(batch.sources, device=self.model.device), batch.inputs["input_ids"].size)
        with self._routed(batch, runs, tick=0):
            return self._features(batch)[0]

    def _laid(self, examples: Examples, documents: Documents, runs: Runs) -> Batch:
        if self.layout == "rows":
            return self.task.rows(examples, documents)
        return self.task.packed(examples, documents, [count for _, count in runs])

    @contextmanager
    def _routed(self, batch: Batch, runs: Runs, tick: int) -> Iterator[None]:
        names = [name for name, count in runs for _ in range(count)]
        if batch.stream is None:
            with self.bank.route(names, tick), streaming(Rows(batch.lengths)):
                yield
            return
        stream = batch.stream
        of_segments = [names[holder] for holder in stream.holders]
        route = self.bank.stream(zip(of_segments, stream.lengths.tolist(), strict=True), tick)
        with route, streaming(Spans(stream.bounds, stream.after)):
            yield

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the outlet gives for the judged items, `[S, width]`, and what they should be, `[S]`."""
        device, dtype = self.model.device, self.model.dtype
        inputs = {name: torch.as_tensor(array, device=device) for name, array in batch.inputs.items()}
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        at, targets = (torch.as_tensor(array, device=device) for array in (batch.sources, batch.targets))
        return self._outlet({**inputs, **self.task.named}).index_select(0, at), targets

    def _loss(
        self, features: Tensor, targets: Tensor, weights: Tensor, batch: Batch, runs: Runs
    ) -> tuple[Tensor, Tensor]:
        head, shaping = self._outlet.head, self._outlet.shaping
        with_words = isinstance(head, TokenHead)
        if head is not None and not with_words and not self._learns(head, runs):
            return frozen_head_loss(features, getattr(head, "base", head), shaping, targets, weights)
        total, losses = features.new_zeros((), dtype=torch.float32), []
        for items, name in _judged_runs(batch, runs):
            own = features[items], targets[items], weights[items]
            if with_words:
                loss, each = frozen_head_loss(own[0], head.base, shaping, *own[1:], head.words(name))
            else:
                loss, each = trained_head_loss(own[0], self._logits_of(name), self._classes(features), *own[1:])
            total = total + loss
            losses.append(each)
        return total, torch.cat(losses)

    def _logits_of(self, name: Way) -> Callable[[Tensor], Tensor]:
        head, shaping = self._outlet.head, self._outlet.shaping
        if head is None:
            return lambda logits: logits
        if isinstance(head, TokenHead):
            own = Head(head.base.weight, head.base.bias, head.words(name))
            return lambda hidden: shaping(own.logits(hidden, hidden.new_empty(len(hidden), own.classes)))

        def through(hidden: Tensor) -> Tensor:
            # The tick stays that of the pass: a block that is computed again must draw the same dropout masks.
            with self.bank.router.set(Route.whole(name), self.bank.router.tick):
                return shaping(head(hidden))

        return through

    def _classes(self, features: Tensor) -> int:
        return features.shape[-1] if self._outlet.head is None else self._outlet.head.weight.shape[0]

    @staticmethod
    def _learns(head: nn.Module, runs: Runs) -> bool:
        """Whether an adapter of these changes the head, or it is trained itself with the rest of the base."""
        if not isinstance(head, Stand):
            return any(parameter.requires_grad for parameter in head.parameters())
        trainers = {name_of(key) for key in head.adapters}
        return any(name in trainers for way, _ in runs for name in members_of(way))

    # ── proof ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _prove(self, want: _Probe) -> None:
        """That documents come out together as they do alone, and, where they share a row, as if they were.

        Raises:
            UnpackableError, NoOutletError: they do not.
        """
        got = self._probed(want.examples)
        if self.layout == "rows":
            if not agree(got, want.logits):
                raise NoOutletError("padded rows do not come out as they do alone")
            return
        if not agree(got, want.logits):
            raise UnpackableError("two packed documents do not come out as they do alone")
        if not agree(got[-1:], self._probed(self.task.probe(changed=True))[-1:], slack=0.25):
            raise UnpackableError("a packed document changes with its neighbour")

    @torch.no_grad()
    def _probed(self, examples: Examples) -> list[Tensor]:
        """Logits of a probe's documents as the engine gets them."""
        runs = [(None, len(examples))]
        batch = self._laid(examples, range(len(examples)), runs)
        with self._routed(batch, runs, tick=0):
            features, _ = self._features(batch)
            logits = self._logits_of(None)(features)
        return list(logits.split(np.bincount(batch.owners, minlength=len(examples)).tolist()))


_PACKED = "documents see only themselves, no padding"


@dataclass(frozen=True)
class _Probe:
    """A task's short documents, and the logits that the model itself gives each alone."""

    examples: Examples
    logits: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, task: Task) -> _Probe:
        model, examples, found = task.model, task.probe(), []
        for i in range(len(examples)):
            alone = task.rows(examples, [i])
            arrays = {name: array for name, array in alone.inputs.items() if not name.endswith("attention_mask")}
            inputs = {name: torch.as_tensor(array, device=model.device) for name, array in arrays.items()}
            inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
            try:
                logits = model(**inputs, **task.named).logits
            except (RuntimeError, TypeError, ValueError) as error:
                said = f"{type(model).__name__} gives no logits for {' and '.join(arrays)} alone: {error}"
                raise ModelError(said, hint=task.hint) from error
            flat = logits.reshape(-1, logits.shape[-1])
            found.append(flat[torch.as_tensor(alone.sources, device=model.device)])
        task.check(examples, found)
        return cls(examples, found)


def _judged_runs(batch: Batch, runs: Runs) -> Iterator[tuple[slice, Way]]:
    """The judged items of each run of documents, and its adapter."""
    borders = np.searchsorted(batch.owners, np.cumsum([0, *(count for _, count in runs)]))
    for (name, _), start, stop in zip(runs, borders[:-1], borders[1:], strict=True):
        yield slice(int(start), int(stop)), name


def _per_document(losses: Tensor, batch: Batch) -> np.ndarray:
    each = losses.double().cpu().numpy()
    documents = np.zeros(batch.documents)
    np.add.at(documents, batch.owners, each)
    return documents


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The base stays in evaluation mode, in training too: it is frozen, and dropout belongs to the adapters."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _compiled(router: Router) -> Iterator[None]:
    router.compiled = True
    try:
        yield
    finally:
        router.compiled = False


@contextmanager
def _dropping(model: nn.Module) -> Iterator[None]:
    """Adapters' dropout is on."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Each block keeps its input and is computed again in the backward pass.

    transformers' own switch works in training mode only, where older models drop activations of the frozen base.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        said = f"{type(model).__name__} has no blocks that can be computed again: checkpointing has no effect"
        warnings.warn(said, RankwiseWarning, stacklevel=2)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
