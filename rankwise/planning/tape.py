"""A record of what is taken and given back, in order, and the most that is there at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Event = tuple[int, int]  # block and its bytes, or block and 0 where it is given back


@dataclass
class Tape:
    """A record of allocations, in order."""

    events: list[Event] = field(default_factory=list)
    alive: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)
    _count: int = 0

    def new(self, size: float) -> int:
        """Bytes are taken; the block's number."""
        self._count += 1
        self._sizes[self._count] = whole = max(1, int(size))
        self.events.append((self._count, whole))
        self.alive += whole
        return self._count

    def drop(self, *blocks: int) -> None:
        """Blocks are given back.  KeyError: one of them was before."""
        for block in blocks:
            self.alive -= self._sizes.pop(block)
            self.events.append((block, 0))


def most_alive(events: Iterable[Event]) -> int:
    """The most bytes that are alive at once."""
    sizes: dict[int, int] = {}
    alive = most = 0
    for block, size in events:
        alive += size or -sizes.pop(block)
        if size:
            sizes[block] = size
            most = max(most, alive)
    return most
