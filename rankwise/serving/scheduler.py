"""Who is computed in the next step: first come, first served, and nobody waits long for another's prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rankwise.serving.cache import BLOCK, Blocks, Node, blocks_for
from rankwise.serving.held import Chunk
from rankwise.serving.requests import Finished, Token, Wanted

Listener = Callable[[Token | Finished], None]

_BESIDE = 8  # while answers are coming, a step takes that part of its most tokens from prompts
_ROWS = 256  # answers at once


class Ticket:
    """A request that was submitted."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """No more tokens are wanted; `Finished("cancelled")` follows before the next step."""
        self.cancelled = True


@dataclass(eq=False)
class Live:
    """A request that waits or is being answered.

    Attributes:
        tokens: the prompt, and what has been answered.
        computed: how many of these are in the cache.
    """

    wanted: Wanted
    listen: Listener
    ticket: Ticket = field(default_factory=Ticket)
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)  # of the full blocks that can be found again, the digest first
    chance: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.wanted.prompt)
        self.chance = np.random.default_rng(self.wanted.sampling.seed)

    @property
    def due(self) -> int:
        """Tokens to be computed before there is a next one."""
        return len(self.tokens) - self.computed

    @property
    def answered(self) -> int:
        return len(self.tokens) - len(self.wanted.prompt)

    @property
    def room(self) -> int:
        """Blocks for the longest it can get; its last token is never computed."""
        return blocks_for(len(self.wanted.prompt) + self.wanted.max_new_tokens - 1)

    @property
    def shares(self) -> bool:
        """Whether what it computes may serve others: nothing is shared under an adapter whose weights have no name."""
        return self.wanted.adapter is None or bool(self.wanted.digest)


@dataclass(frozen=True)
class Part:
    """What a step computes of one request."""

    live: Live
    stop: int

    def chunk(self) -> Chunk:
        live = self.live
        tokens = live.tokens[live.computed : self.stop]
        return Chunk(tokens, self.stop, live.blocks, live.wanted.adapter, self.stop == len(live.tokens))


class Scheduler:
    """The requests of an engine.

    Args:
        blocks: the cache.
        most: tokens of a step.
    """

    def __init__(self, blocks: Blocks, most: int) -> None:
        self.blocks, self.most = blocks, most
        self.running: list[Live] = []
        self.waiting: deque[Live] = deque()

    def plan(self) -> list[Part]:
        """The next step's, by adapter; admits who waits, in order, while there is room."""
        answering = [live for live in self.running if live.due == 1]
        parts = [Part(live, len(live.tokens)) for live in answering]
        left = self.most - len(parts)
        if parts:
            left = min(left, max(BLOCK, self.most // _BESIDE))
        for live in self.running:
            if live.due > 1 and left > 0:
                left -= self._planned(live, left, parts)
        while self.waiting and left > 0 and len(self.running) < min(_ROWS, self.most):
            live = self.waiting[0]
            if not self._admitted(live):
                break
            self.waiting.popleft()
            self.running.append(live)
            left -= self._planned(live, left, parts)
        return sorted(parts, key=lambda part: part.live.wanted.adapter or "")

    def _planned(self, live: Live, most: int, parts: list[Part]) -> int:
        stop = live.computed + min(live.due, most)
        parts.append(Part(live, stop))
        self._publish(live, stop)
        return stop - live.computed

    def _admitted(self, live: Live) -> bool:
        known, node = self.blocks.known(live.wanted.digest, live.tokens) if live.shares else ([], "")
        taken = self.blocks.taken(known, live.room - len(known))
        if taken is None:
            return False
        live.blocks, live.computed = taken, BLOCK * len(known)
        live.nodes = [live.wanted.digest, *[node] * len(known)]
        return True

    def _publish(self, live: Live, stop: int) -> None:
        """Blocks that are full after this step can be found by whoever is planned behind it.

        In each layer the keys and values of a step are kept before any of its tokens attends.
        """
        for at in range(len(live.nodes) - 1, stop // BLOCK) if live.shares else ():
            tokens = live.tokens[at * BLOCK : (at + 1) * BLOCK]
            live.nodes.append(self.blocks.publish(live.blocks[at], live.nodes[-1], tokens))

    def advance(self, parts: Sequence[Part]) -> None:
        """The step has been computed."""
        for part in parts:
            part.live.computed = part.stop
            self._publish(part.live, part.stop)

    def leave(self, live: Live, *, spoilt: bool = False) -> None:
        """It is over for one that runs or waits; `spoilt`: what its blocks hold may be wrong."""
        if live in self.running:
            self.running.remove(live)
            self.blocks.release(live.blocks, spoilt=spoilt)
            live.blocks = []
        elif live in self.waiting:
            self.waiting.remove(live)
