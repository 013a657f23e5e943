"""One pass of routed documents through a bank's model: how it goes is found out once, and proved on a probe.

Packed where the model's attention allows it, row by row where it does not; through the frozen head in chunks where the
model's logits are that head of its hidden states, through the model's own logits where they are more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rankwise.data.corpus import Corpus
from rankwise.data.stream import LEAST_SHARED, Stream, lay
from rankwise.engine.attention import UnpackableError, packed, streaming
from rankwise.engine.blocks import fused_blocks
from rankwise.engine.head import Head, Shaping, frozen_head_loss, measured_losses, trained_head_loss
from rankwise.errors import ModelError, RankwiseWarning
from rankwise.kernels.attention import Spans
from rankwise.kernels.library import reclaim_memory_lazily
from rankwise.surgery.bank import Bank
from rankwise.surgery.layer import AdaptedLayer, Stand
from rankwise.surgery.routing import Route, Router
from rankwise.surgery.tokens import TokenHead

Runs = Sequence[tuple[str | None, int]]  # adapter (None: the base) and how many documents it takes, in order

_HINT = "train and evaluate take causal language models"

# How far two correct ways through one model may lie apart, relative to the logits.
_SAME = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Losses:
    """What a pass found: summed negative log-likelihood of the supervised tokens of each document, in nats."""

    documents: np.ndarray


class Forward:
    """The engine's hold on a model, for the length of a `with`.

    Attributes:
        layout: `packed` streams or padded `rows`, and `reason` why.
        fused: how many blocks run on compiled kernels.
        own_logits: whether the model's own logits are taken, and not its hidden states through the head.

    Raises:
        ModelError: the model gives no logits over tokens, or none of the ways agrees with the model itself.
    """

    def __init__(self, bank: Bank, *, checkpointing: bool = False) -> None:
        if not isinstance(bank.model, PreTrainedModel) or bank.model.get_output_embeddings() is None:
            raise ModelError(
                f"{type(bank.model).__name__} has no language-model head",
                hint=_HINT,
            )
        if bank.model.config.is_encoder_decoder:
            raise ModelError(f"{type(bank.model).__name__} has an encoder beside its decoder", hint=_HINT)
        self.bank, self.model = bank, bank.model
        self.checkpointing = checkpointing
        self.layout: Literal["packed", "rows"] = "packed"
        self.reason = ""
        self.fused = 0
        self.shaping = Shaping.of(self.model.config.get_text_config())
        # Some wrappers name no base of theirs, and are given back as their own: what comes out is logits already.
        self.own_logits = self.model.base_model is self.model
        self._held = ExitStack()

    def __enter__(self) -> Forward:
        reclaim_memory_lazily()
        with ExitStack() as held:
            self._take_hold(held)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _take_hold(self, held: ExitStack) -> None:
        held.enter_context(_evaluating(self.model))
        held.enter_context(self.bank.use(None))
        want = _Probe.of(self.model)
        self.fused = held.enter_context(fused_blocks(self.model))
        held.enter_context(_compiled(self.bank.router))
        try:
            with ExitStack() as packing:
                packing.enter_context(packed(self.model))
                self._prove_packing(want)
                held.push(packing.pop_all())
            self.reason = "documents see only themselves, no padding"
        except UnpackableError as refusal:
            self.layout, self.reason = "rows", str(refusal)
        except (RuntimeError, TypeError, ValueError) as error:  # a model may break where it meets a packed stream
            said = (str(error) or "no reason given").splitlines()[0]
            self.layout, self.reason = "rows", f"a packed stream ends in a {type(error).__name__}: {said}"
        if self.layout == "rows":
            self._prove_rows(want)
        if self.checkpointing:
            held.enter_context(_checkpointing(self.model))

    # ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────

    def learn(
        self, corpus: Corpus, documents: Sequence[int] | np.ndarray, runs: Runs, weights: np.ndarray, tick: int
    ) -> Losses:
        """Forward and backward: gradients of `Σ weights[i] · loss of document i` are added to the adapters' own.

        `weights` is float `[D]`; `tick` numbers the pass for dropout.
        """
        stream = self._laid(corpus, documents, runs)
        with self._routed(stream, runs, tick), _dropping(self.model):
            hidden, targets = self._supervised_hidden(stream)
            each = torch.as_tensor(weights[stream.owners], dtype=torch.float32, device=hidden.device)
            loss, losses = self._loss(hidden, targets, each, stream, runs)
            if loss.requires_grad:
                loss.backward()
        return _per_document(losses, stream)

    @torch.no_grad()
    def measure(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, runs: Runs) -> Losses:
        """Forward alone."""
        stream = self._laid(corpus, documents, runs)
        with self._routed(stream, runs, tick=0):
            hidden, targets = self._supervised_hidden(stream)
            parts = [
                measured_losses(hidden[rows], self._logits_of(name), self._classes, targets[rows])
                for rows, name in _supervised_runs(stream, runs)
            ]
        return _per_document(torch.cat(parts), stream)

    @torch.no_grad()
    def look(
        self, corpus: Corpus, documents: Sequence[int] | np.ndarray, name: str, see: Callable[[Tensor, int], None]
    ) -> Tensor:
        """Forward through one adapter, for somebody who watches the layers; gives what the head takes, `[S, H]`.

        `see` is told beforehand which rows `[S]` of their inputs, leading dimensions flattened, predict supervised
        tokens, and how many rows there are.
        """
        runs = [(name, len(documents))]
        stream = self._laid(corpus, documents, runs)
        rows, of = self._places(stream)
        see(torch.as_tensor(rows, device=self.model.device), of)
        with self._routed(stream, runs, tick=0):
            return self._supervised_hidden(stream)[0]

    def _laid(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, runs: Runs) -> Stream:
        """Padded rows are whole documents; in a packed stream those of one adapter share how they begin."""
        return lay(corpus, documents, [count for _, count in runs] if self.layout == "packed" else None)

    @contextmanager
    def _routed(self, stream: Stream, runs: Runs, tick: int) -> Iterator[None]:
        names = [name for name, count in runs for _ in range(count)]
        if self.layout == "rows":
            route = self.bank.route(names, tick)
        else:
            of_segments = [names[holder] for holder in stream.holders]
            route = self.bank.stream(zip(of_segments, stream.lengths.tolist(), strict=True), tick)
        with route, streaming(Spans(stream.bounds, stream.after)):
            yield

    def _supervised_hidden(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Hidden states `[S, H]` at the positions that predict supervised tokens, and those tokens `[S]`."""
        device = self.model.device
        sources, _ = self._places(stream)
        tensors = _packed_inputs(stream) if self.layout == "packed" else _row_inputs(stream)
        inputs = {name: torch.as_tensor(array, device=device) for name, array in tensors.items()}
        at, targets = torch.as_tensor(sources, device=device), torch.as_tensor(stream.targets, device=device)
        if self.own_logits:
            hidden = self.model(**inputs, use_cache=False).logits
        else:
            hidden = self.model.base_model(**inputs, use_cache=False)[0]
        return hidden.flatten(0, 1).index_select(0, at), targets

    def _places(self, stream: Stream) -> tuple[np.ndarray, int]:
        """Where the positions `[S]` that predict supervised tokens stand in a flattened input, and its length."""
        if self.layout == "packed":
            return stream.sources, stream.size
        width = int(stream.lengths.max())
        return stream.owners * width + stream.positions[stream.sources], width * len(stream.lengths)

    def _loss(
        self, hidden: Tensor, targets: Tensor, weights: Tensor, stream: Stream, runs: Runs
    ) -> tuple[Tensor, Tensor]:
        head = self.model.get_output_embeddings()
        with_words = isinstance(head, TokenHead) and not self.own_logits
        if not self.own_logits and not with_words and not any(name in self._trainers(head) for name, _ in runs):
            return frozen_head_loss(hidden, getattr(head, "base", head), self.shaping, targets, weights)
        total, losses = hidden.new_zeros((), dtype=torch.float32), []
        for rows, name in _supervised_runs(stream, runs):
            own = hidden[rows], targets[rows], weights[rows]
            if with_words:
                loss, each = frozen_head_loss(own[0], head.base, self.shaping, *own[1:], head.words(name))
            else:
                loss, each = trained_head_loss(own[0], self._logits_of(name), self._classes, *own[1:])
            total = total + loss
            losses.append(each)
        return total, torch.cat(losses)

    def _logits_of(self, name: str | None) -> Callable[[Tensor], Tensor]:
        if self.own_logits:
            return lambda logits: logits
        head = self.model.get_output_embeddings()
        if isinstance(head, TokenHead):
            own = Head(head.base.weight, head.base.bias, head.words(name))
            return lambda hidden: self.shaping(own.logits(hidden, hidden.new_empty(len(hidden), own.classes)))

        def through(hidden: Tensor) -> Tensor:
            # The tick stays that of the pass: a block that is computed again must draw the same dropout masks.
            with self.bank.router.set(Route.whole(name), self.bank.router.tick):
                return self.shaping(head(hidden))

        return through

    @property
    def _classes(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @staticmethod
    def _trainers(head: nn.Module) -> set[str]:
        """Adapters that change the head."""
        return {key.replace(":", ".") for key in head.adapters} if isinstance(head, Stand) else set()

    # ── proof ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _prove_packing(self, want: _Probe) -> None:
        got = self._probed(want)
        if not _agree(got, want.logits):
            raise UnpackableError("two packed documents do not come out as they do alone")
        if not _agree(got[-1:], self._probed(want.with_another_first())[-1:], slack=0.25):
            raise UnpackableError("a packed document changes with its neighbour")

    def _prove_rows(self, want: _Probe) -> None:
        """Padded rows with the model's own attention, and if need be its own logits."""
        if _agree(self._probed(want), want.logits):
            return
        self.own_logits = True
        if not _agree(self._probed(want), want.logits):
            raise ModelError(f"{type(self.model).__name__}: padded rows do not come out as they do alone")

    @torch.no_grad()
    def _probed(self, probe: _Probe) -> list[Tensor]:
        """Logits of the probe's documents as the engine gets them."""
        runs = [(None, len(probe.documents))]
        stream = self._laid(probe.corpus(), range(len(probe.documents)), runs)
        with self._routed(stream, runs, tick=0):
            hidden, _ = self._supervised_hidden(stream)
            logits = self._logits_of(None)(hidden)
        return list(logits.split([len(tokens) - 1 for tokens in probe.documents]))


@dataclass(frozen=True)
class _Probe:
    """Short documents of random tokens, the last two alike at first, and the logits the model gives each alone."""

    documents: list[np.ndarray]
    logits: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> _Probe:
        words = model.config.get_text_config().vocab_size
        sizes = (7, LEAST_SHARED + 2, LEAST_SHARED + 5)
        documents = [np.random.default_rng(seed).integers(words, size=size) for seed, size in enumerate(sizes)]
        documents[2][:LEAST_SHARED] = documents[1][:LEAST_SHARED]
        rows = [torch.as_tensor(tokens, device=model.device).unsqueeze(0) for tokens in documents]
        try:
            logits = [model(input_ids=row, use_cache=False).logits[0, :-1] for row in rows]
            start = model(input_ids=rows[0][:, :4], use_cache=False).logits[0]
        except (RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"{type(model).__name__} gives no logits for tokens alone: {error}", hint=_HINT) from error
        if not _agree([start], [logits[0][:4]]):
            raise ModelError(
                f"{type(model).__name__} is not causal: what a token predicts depends on what comes after it",
                hint=_HINT,
            )
        return cls(documents, logits)

    def with_another_first(self) -> _Probe:
        return _Probe([self.documents[0][::-1].copy(), *self.documents[1:]], self.logits)

    def corpus(self) -> Corpus:
        """Every token but the first of each is supervised."""
        lengths = [len(tokens) for tokens in self.documents]
        tokens, bounds = np.concatenate(self.documents), np.cumsum([0, *lengths])
        supervised = np.ones(len(tokens), dtype=np.bool_)
        supervised[bounds[:-1]] = False
        return Corpus(tokens, supervised, bounds, np.zeros((len(lengths), 2), dtype=np.int64), ("",))


def _agree(got: list[Tensor], want: list[Tensor], slack: float = 1.0) -> bool:
    limit = slack * _SAME[want[0].dtype]
    pairs = zip(got, want, strict=True)
    return all(g.shape == w.shape and bool((g - w).norm() <= limit * w.norm()) for g, w in pairs)


def _packed_inputs(stream: Stream) -> dict[str, np.ndarray]:
    return {"input_ids": stream.tokens[None], "position_ids": stream.positions[None]}


def _row_inputs(stream: Stream) -> dict[str, np.ndarray]:
    """A row a document, padded on the right with token 0, which the mask hides."""
    lengths = stream.lengths
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, dtype=np.int64)
    tokens[mask] = stream.tokens
    return {"input_ids": tokens, "attention_mask": mask.astype(np.int64)}


def _supervised_runs(stream: Stream, runs: Runs) -> Iterator[tuple[slice, str | None]]:
    """The supervised tokens of each run of documents, and its adapter."""
    borders = np.searchsorted(stream.owners, np.cumsum([0, *(count for _, count in runs)]))
    for (name, _), start, stop in zip(runs, borders[:-1], borders[1:], strict=True):
        yield slice(int(start), int(stop)), name


def _per_document(losses: Tensor, stream: Stream) -> Losses:
    each = losses.double().cpu().numpy()
    documents = np.zeros(len(stream.documents))
    np.add.at(documents, stream.owners, each)
    return Losses(documents)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
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
