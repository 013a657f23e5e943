"""The directions in which the inputs of layers vary most (init `eva`, arXiv:2410.07170).

Only positions that predict supervised tokens count: what a layer is given there is what the loss sees of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.adapters.directions import Principal
from rankwise.adapters.dropout import mixed
from rankwise.adapters.ranks import ranks_by_share
from rankwise.data.corpus import Corpus
from rankwise.engine.forward import Forward
from rankwise.errors import SpecError, TrainingError

SETTLED = 0.99  # the cosine between a direction and itself one piece later


@dataclass(frozen=True)
class Varying:
    """What was found.

    Attributes:
        directions: path → `[R, I]`, R the rank that the layer has come to; layers that no token reached are left out.
        shares: path → the part of its input's variance that each direction has, as many as the layer may come to.
        documents: how many went through.
        unsettled: inputs whose directions still moved at the end.
    """

    directions: dict[str, Tensor]
    shares: dict[str, list[float]]
    documents: int
    unsettled: int


def most_varying(
    forward: Forward,
    probe: str,
    ranks: Mapping[str, tuple[int, int]],
    corpus: Corpus,
    batches: Sequence[np.ndarray],
    seed: int,
    advance: Callable[[float], None],
) -> Varying:
    """Goes through documents until the directions that the ranks need have settled, or there are no more.

    Args:
        forward: holds the bank of the probe.
        probe: an adapter that changes nothing in the layers looked at.
        ranks: path of a layer → the rank that counts towards the total, and the most that it may come to.
        corpus, batches: documents, and which of them go through the model at once.
        seed: of the search.
        advance: is told how far it is, from 0 to 1.

    Raises:
        SpecError: a layer is not given every token.
        TrainingError: an input is not finite.
    """
    inputs = _Inputs(forward, probe, ranks, seed)
    seen = 0
    with inputs:
        for number, batch in enumerate(batches):
            inputs.look(corpus, batch)
            seen += len(batch)
            advance((number + 1) / len(batches))
            if inputs.settle() == 0:
                break
    found = {path: inputs.principals[inputs.leaders[path]].directions[:rank] for path, rank in inputs.ranks().items()}
    return Varying(found, inputs.shares(), seen, inputs.settle())


class _Inputs:
    """The inputs of layers, each taken in once however many layers share it, for the length of a `with`."""

    def __init__(self, forward: Forward, probe: str, ranks: Mapping[str, tuple[int, int]], seed: int) -> None:
        self.forward, self.probe, self.asked, self.seed = forward, probe, ranks, seed
        self.leaders: dict[str, str] = {}  # path → the first layer that is given the same input
        self.principals: dict[str, Principal] = {}  # by leader
        self.settled: set[str] = set()
        self._rows, self._of = torch.empty(0), 0
        self._last: tuple[Tensor, str] | None = None
        self._held = ExitStack()

    def __enter__(self) -> _Inputs:
        for path in self.asked:
            module: Any = self.forward.model.get_submodule(path)
            self._held.callback(module.register_forward_pre_hook(self._watching(path)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def look(self, corpus: Corpus, documents: np.ndarray) -> None:
        """Takes in what documents are to every layer that has not settled."""

        def see(rows: Tensor, of: int) -> None:
            self._rows, self._of = rows, of

        hidden = self.forward.look(corpus, documents, self.probe, see)
        self._last = None
        head = self._head()
        if head is not None and self.leaders.setdefault(head, head) not in self.settled:
            self._take(head, hidden)

    def _head(self) -> str | None:
        """The output layer, which the engine does not call on its way to the hidden states."""
        head = self.forward.model.get_output_embeddings()
        paths = (path for path in self.asked if self.forward.model.get_submodule(path) is head)
        return None if self.forward.own_logits else next(paths, None)

    def _watching(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def watch(_: nn.Module, given: tuple[Any, ...]) -> None:
            x: Tensor = given[0]
            if path not in self.leaders:
                self.leaders[path] = self._last[1] if self._last is not None and self._last[0] is x else path
            self._last = x, self.leaders[path]
            if self.leaders[path] != path or path in self.settled:
                return
            flat = x.reshape(-1, x.shape[-1])
            if len(flat) != self._of:
                raise SpecError(
                    f"{path}: init 'eva' looks at every token, and this layer is given {len(flat)} of {self._of}",
                    hint="leave it out of the targets, or take another init",
                )
            self._take(path, flat[self._rows])

        return watch

    def _take(self, path: str, rows: Tensor) -> None:
        if not rows.isfinite().all():
            raise TrainingError(
                f"{path}: what the documents are to this layer is not finite",
                hint="another number format (dtype), or another init",
            )
        if path not in self.principals:
            most = min(max(cap for _, cap in self.asked.values()), rows.shape[1])
            generator = torch.Generator().manual_seed(mixed(self.seed, crc32(path.encode())))
            self.principals[path] = Principal(most, generator)
        self.principals[path].take(rows)

    def shares(self) -> dict[str, list[float]]:
        """Of every layer that was reached, in the model's order."""
        reached = [path for path in self.asked if path in self.leaders]
        return {path: self.principals[self.leaders[path]].shares[: self.asked[path][1]] for path in reached}

    def ranks(self) -> dict[str, int]:
        """Of every layer that was reached, by what has come so far."""
        shares = self.shares()
        return ranks_by_share(shares, sum(self.asked[path][0] for path in shares))

    def settle(self) -> int:
        """How many inputs have not settled: directions that some rank needs still move.

        One that has settled is not taken in again, unless a layer comes to a higher rank meanwhile.
        """
        needed: dict[str, int] = {}
        for path, rank in self.ranks().items():
            needed[self.leaders[path]] = max(rank, needed.get(self.leaders[path], 0))
        self.settled = {
            path for path, rank in needed.items() if bool((self.principals[path].agreement[:rank] >= SETTLED).all())
        }
        return len(needed) - len(self.settled)
