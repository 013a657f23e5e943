"""The engine's hold on a model: how a step's tokens go through it, found out once and proved on a probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.engine.agree import agree
from rankwise.engine.attention import UnpackableError, attending
from rankwise.engine.forward import evaluating
from rankwise.engine.outlet import NoOutletError, OfBase, Outlet
from rankwise.errors import ModelError
from rankwise.kernels.cached import Piece, Pieces
from rankwise.kernels.grouped import Adapters, Grouped
from rankwise.kernels.heap import keep_freed_memory
from rankwise.serving.attention import NAME, Store
from rankwise.serving.cache import BLOCK, blocks_for
from rankwise.serving.decoder import DecoderLayers, decoder_layers
from rankwise.serving.rack import Rack
from rankwise.surgery.bank import Bank

_HINT = "serve a causal language model whose attention goes through transformers' interface"
_PROBE = (13, BLOCK + 7)  # tokens of the probe's two texts
_FEW, _MANY = 64, 320  # tokens up to which all layers are one call: of any past, and of a short one
_SHORT = 1 << 17  # pairs of a token and one that it sees: there attention takes each token by itself


@dataclass(frozen=True)
class Chunk:
    """Tokens of one request that a step computes: the last of the `seen` it has had then."""

    tokens: Sequence[int]
    seen: int
    blocks: Sequence[int]
    adapter: str | None
    asks: bool  # whether what the last token predicts is wanted


class Held:
    """A model, for the length of a `with`.

    Attributes:
        bytes_per_token: of keys and values.
        context: how many tokens a request can have; None where the model sets no limit.
        as_one: whether few tokens go through all layers in one compiled call.

    Raises:
        ModelError: the model is not made for this, or does not come out as it does alone.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank, self.model = bank, bank.model
        _check(self.model)
        self.context = _context(self.model.config.get_text_config())
        self.words = int(self.model.get_output_embeddings().weight.shape[0])
        self.rack = Rack(bank)
        self._outlet: type[Outlet] = Outlet
        self._open = Outlet(self.model)
        self._head: Grouped | None = None  # the output layer, where it is one compiled call
        self._store = Store(0)
        self._offset: float | None = None  # of the norms, where the layers are a plain decoder's
        self._layers: DecoderLayers | None = None
        self._known: tuple[Any, ...] = ()  # of what, when the last three were found
        self._held = ExitStack()

    def __enter__(self) -> Held:
        keep_freed_memory()
        _ = self.bank.sites, self.bank.modules, self.bank.base_fingerprint  # of the clean model
        with ExitStack() as held:
            held.enter_context(evaluating(self.model))
            self._take_hold(held)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()
        self._layers, self._known = None, ()

    @property
    def bytes_per_token(self) -> int:
        return self._store.bytes_per_slot

    @property
    def as_one(self) -> bool:
        return self._layers is not None

    def make_room(self, slots: int) -> None:
        """A cache of so many tokens; whatever another one held is gone."""
        self._store = self._store.grown(slots)
        self._renew()

    @contextmanager
    def apart(self, *, members_only: bool = False) -> Iterator[None]:
        """Within it the bank may change: nothing of the engine's stands in the model's modules.

        With `members_only` adapters may come and go, and nothing else: who stays is not looked at again.
        """
        self._let_go()
        try:
            yield
        finally:
            self._renew(members_only=members_only)

    def _renew(self, *, members_only: bool = False) -> None:
        """Takes in what the bank holds now."""
        self._let_go()
        self.rack.refresh(members_only=members_only)
        self.rack.put_up()
        known = self._outlet, self._offset, self._store, self.rack.turn
        if known != self._known:
            self._known = known
            self._look()

    def _look(self) -> None:
        """Finds out how the model goes as it stands."""
        self._open = self._outlet(self.model)
        self._head = None if self._open.head is None else self.rack.linear(self._open.head)
        self._layers = None
        if self._offset is not None:
            self._layers = decoder_layers(self.model, self.rack, self._store, self._offset)

    def _let_go(self) -> None:
        self.rack.take_down()

    def _take_hold(self, held: ExitStack) -> None:
        want = self._alone()
        try:
            held.enter_context(attending(self.model, NAME))
        except UnpackableError as refusal:
            raise ModelError(str(refusal), hint=_HINT) from refusal
        held.callback(self._let_go)
        refusals = []
        first = [] if self.model.base_model is self.model else [OfBase]
        for self._outlet in (*first, Outlet):
            self._store = Store(BLOCK * sum(map(blocks_for, _PROBE)))
            self._renew()
            refusals.append(self._refused(want))
            if refusals[-1] is None:
                self._try_as_one(want)
                return
        raise ModelError(f"{type(self.model).__name__} cannot be served: {refusals[-1]}", hint=_HINT)

    def _try_as_one(self, want: list[Tensor]) -> None:
        for self._offset in (0.0, 1.0):
            self._renew()
            if self._layers is None:
                break
            if self._refused(want) is None:
                return
        self._offset = self._layers = None
        self._known = ()

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """What comes after each chunk that asks, `[R, words]`, in order; their keys and values are kept."""
        device = self.model.device
        tokens = [token for chunk in chunks for token in chunk.tokens]
        places = [i for chunk in chunks for i in range(chunk.seen - len(chunk.tokens), chunk.seen)]
        pieces, last, done = [], [], 0
        for chunk in chunks:
            pieces.append(Piece(done, done + len(chunk.tokens), chunk.seen, chunk.blocks))
            done += len(chunk.tokens)
            last += [done - 1] if chunk.asks else []
        inputs = {
            "input_ids": torch.tensor([tokens], device=device),
            "position_ids": torch.tensor([places], device=device),
            "use_cache": False,
        }
        short = sum(piece.own * piece.seen for piece in pieces) <= _SHORT
        as_one = self._layers is not None and done <= (_MANY if short else _FEW)
        with self._routed([(chunk.adapter, len(chunk.tokens)) for chunk in chunks]), ExitStack() as standing:
            if as_one and self._layers is not None:
                standing.enter_context(self._layers.standing())
            standing.enter_context(self._store.step(Pieces(pieces, BLOCK, device)))
            features = self._open(inputs)
        if len(last) < len(features):
            features = features.index_select(0, torch.tensor(last, dtype=torch.long, device=device))
        head = self._open.head
        if head is None or not last:
            return features
        with self._routed([(chunk.adapter, 1) for chunk in chunks if chunk.asks]):
            if self._head is not None and len(last) <= _MANY:
                return self._open.shaping(self._head.product(features, self.rack.adapters))
            return self._open.shaping(head(features.unsqueeze(0))[0])

    @contextmanager
    def _routed(self, runs: Sequence[tuple[str | None, int]]) -> Iterator[None]:
        """Rows, in runs, through their adapters: by number on the rack, by the bank's route elsewhere."""
        names = {name for name, _ in runs}
        self.rack.adapters = Adapters.of([(self.rack.number(name), count) for name, count in runs])
        with self.bank.use(names.pop()) if len(names) == 1 else self.bank.stream(runs):
            yield

    # ── proof ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _texts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(self.words, (size,), generator=generator).tolist() for size in _PROBE]

    @torch.no_grad()
    def _alone(self) -> list[Tensor]:
        """The logits that the model itself gives each text of the probe alone, through the bare base."""
        found = []
        with self.bank.use(None) if self.bank.router.merged is None else self.bank.use(self.bank.router.merged):
            for text in self._texts():
                inputs = torch.tensor([text], device=self.model.device)
                found.append(self.model(input_ids=inputs, use_cache=False).logits[0])
        return found

    def _refused(self, want: list[Tensor]) -> str | None:
        """Takes the outlet if a text in pieces, beside another, comes out as it does alone; else says why not."""
        texts, name = self._texts(), self.bank.router.merged
        room = [blocks_for(len(text)) for text in texts]
        own = [list(range(room[0])), list(reversed(range(room[0], sum(room))))]  # blocks need not lie in order

        def chunk(which: int, start: int, stop: int) -> Chunk:
            return Chunk(texts[which][start:stop], stop, own[which], name, True)

        a, b = map(len, texts)
        steps = [[(0, 0, a - 2), (1, 0, 3)], [(1, 3, b - 2)], [(1, b - 2, b - 1), (0, a - 2, a - 1)]]
        steps.append([(0, a - 1, a), (1, b - 1, b)])
        try:
            for step in steps:
                got = self.logits([chunk(*one) for one in step])
                expected = [want[which][stop - 1 : stop] for which, _, stop in step]
                if not agree(list(got.split(1)), expected):
                    return "a text in pieces, beside another, does not come out as it does alone"
        except (UnpackableError, NoOutletError) as refusal:
            return str(refusal)
        except (RuntimeError, TypeError, ValueError) as error:  # a model may break where it meets what it does not know
            said = (str(error) or "no reason given").splitlines()[0]
            return f"a text in pieces ends in a {type(error).__name__}: {said}"
        return None


def _check(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no language-model head", hint=_HINT)
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} has an encoder beside its decoder", hint=_HINT)


def _context(config: Any) -> int | None:
    """Tokens up to which what the model does to one text does not depend on how long another beside it is.

    Two kinds of rotary embedding change for all of a batch where its longest text passes the length that the model
    was first trained on; they are served up to that.
    """
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]
    for one in kinds:
        if one.get("rope_type") in ("dynamic", "longrope"):
            first = one.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            most = min(filter(None, (first, most)), default=None)
    return most
