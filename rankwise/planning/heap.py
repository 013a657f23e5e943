"""What a step's allocations take: alive at once, and in the heap of a C library that never gives memory back.

The engine tells glibc to keep freed memory (kernels/library.py), so a heap grows to wherever its last block ever lay,
gaps between blocks included.  Gaps come from tensors that stay (gradients, moments) in the middle of those that go; how
large they are follows from the order of allocations, which is played through here with glibc's rule: the smallest gap
that is large enough, neighbours that are free become one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

Event = tuple[int, int]  # block and its bytes, or block and 0 where it is given back
_OWN_MAPPING = 32 * 2**20  # glibc's largest limit for blocks of their own, as set in kernels/library.py
# glibc's malloc.c: its own words before a block, its smallest block, and torch's alignment.  For an aligned block
# (_int_memalign) it looks for more room than that takes and gives the rest back, so that a gap which a tensor has left
# is too small for the next tensor of its size until a neighbour is free too.
_WORDS, _SMALLEST, _ALIGNMENT = 16, 32, 64
_TO_ALIGN = _ALIGNMENT + _SMALLEST + _WORDS


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


class _Heap:
    def __init__(self) -> None:
        self.top = 0
        self._gaps: list[tuple[int, int]] = []  # size, start
        self._ends: dict[int, int] = {}  # end → start of a gap
        self._starts: dict[int, int] = {}  # start → end

    def take(self, size: int) -> tuple[int, int]:
        """Where a block begins and ends."""
        room, size = size + _TO_ALIGN, size + _WORDS
        place = bisect_left(self._gaps, (room, 0))
        if place < len(self._gaps):
            start = self._gaps[place][1]
            end = self._remove(start)
        else:  # the gap below the top, if there is one, grows
            start = self._ends.get(self.top, self.top)
            if start < self.top:
                self._remove(start)
            end = self.top = max(self.top, start + room)
        if end > start + size:
            self._add(start + size, end)
        return start, start + size

    def give(self, start: int, end: int) -> None:
        if end in self._starts:
            after, end = end, self._starts[end]
            self._remove(after)
        if start in self._ends:
            start = self._ends[start]
            self._remove(start)
        self._add(start, end)

    def _add(self, start: int, end: int) -> None:
        insort(self._gaps, (end - start, start))
        self._starts[start], self._ends[end] = end, start

    def _remove(self, start: int) -> int:
        """The end of a gap that is one no more."""
        end = self._starts.pop(start)
        del self._ends[end]
        del self._gaps[bisect_left(self._gaps, (end - start, start))]
        return end


def most_resident(events: Iterable[Event]) -> int:
    """The most bytes such a heap and the large blocks beside it take."""
    heap, places, own, most = _Heap(), dict[int, tuple[int, int]](), 0, 0
    for block, size in events:
        if size >= _OWN_MAPPING:
            own += size
            places[block] = (-1, size)
        elif size:
            places[block] = heap.take(size)
        else:
            start, end = places.pop(block)
            if start < 0:
                own -= end
            else:
                heap.give(start, end)
        most = max(most, heap.top + own)
    return most
