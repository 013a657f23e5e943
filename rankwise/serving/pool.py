"""Many adapters by name, a few of them in the bank: read when they are asked for, the longest unused gives way.

All of it lives in one event loop.  Files are read and checked in other threads; the engine is asked only to change the
bank between two steps.  In the bank every adapter that comes has a name of its own, so that requests which run through
an older one of the same name end as they began.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.adapters.adapter import checked_name
from rankwise.errors import BankError, QueueFullError, SpecError
from rankwise.serving.admission import Admission, Admitted, Parts
from rankwise.serving.engine import Engine
from rankwise.serving.wire import RefusedError, unknown_model

_READERS = 2  # adapters that are read at once


@dataclass(frozen=True)
class Through:
    """What a request runs through: a name in the bank, or None for the base; and the digest of its weights."""

    key: str | None
    digest: str


@dataclass(eq=False)
class _Entry:
    """An adapter that is served, or was until a moment ago.

    Attributes:
        parts: None until it has been read.
        users: requests that run through it or wait for it.
        leaving: nobody may ask for it any more.
    """

    name: str
    folder: Path
    parts: Parts | None = None
    through: Through | None = None
    users: int = 0
    leaving: bool = False
    loading: asyncio.Task[None] | None = field(default=None, repr=False)


@dataclass
class PoolFigures:
    """Counted since the start."""

    loads: int = 0
    evictions: int = 0
    refused: int = 0
    load_seconds: float = 0.0


class Pool:
    """The adapters of a server.

    Args:
        resident: how many the bank may hold at once.
        taken: names that no adapter can have.
        patience: seconds that a request waits for room before it is turned away.
        most_waiting: requests that may wait for room.
    """

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        *,
        resident: int = 32,
        taken: tuple[str, ...] = (),
        patience: float = 30.0,
        most_waiting: int = 256,
    ) -> None:
        if resident < 1:
            raise SpecError(f"room for {resident} adapters", hint="1 or more")
        self.engine, self.admission = engine, admission
        self.most, self.taken = resident, taken
        self.patience, self.most_waiting = patience, most_waiting
        self.figures = PoolFigures()
        self._entries: dict[str, _Entry] = {}
        self._held: OrderedDict[str, _Entry] = OrderedDict()  # by name in the bank, the longest unused first
        self._reserved = 0  # places of the bank that somebody is about to take
        self._count = self._waiting = 0
        self._readers = asyncio.Semaphore(_READERS)
        self._changed = asyncio.Condition()
        self._parts: dict[Parts, Parts] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # a loop holds those that run by a weak reference only

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of those in the bank, the longest unused first."""
        return tuple(entry.name for entry in self._held.values() if not entry.leaving)

    def folder(self, name: str) -> Path:
        return self._entries[name].folder

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    # ── coming and going ─────────────────────────────────────────────────────────────────────────────────────────

    def offer(self, name: str, folder: Path) -> None:
        """Serves an adapter that is read and checked when it is first asked for.

        Raises:
            BankError: the name is taken or is none.
        """
        self._check_name(name)
        self._entries[name] = _Entry(name, folder)

    async def add(self, name: str, folder: Path, *, replace: bool = False) -> None:
        """Serves an adapter, once it has been read and checked.

        With `replace` it takes the place of one of the same name: who runs through that ends as they began.

        Raises:
            BankError: the name is taken or is none, or the adapter is in the way of another.
            RankwiseError: it cannot be served; of `Admission.read`.
        """
        self._check_name(name, replace=replace)
        try:
            found = await self._read(folder)
            self._check_name(name, replace=replace)  # somebody may have been faster
            parts = self._settled(name, found)
        except Exception:
            self.figures.refused += 1
            raise
        old = self._entries.pop(name, None)
        self._entries[name] = _Entry(name, folder, parts)
        if old is not None:
            old.leaving = True
            self._begin(self._retire(old))

    async def remove(self, name: str) -> None:
        """Serves it no more; returns when the last request that runs through it has ended and the bank is rid of it.

        Raises:
            RefusedError: there is none of that name.
        """
        entry = self._entry(name)
        entry.leaving = True
        del self._entries[name]
        await asyncio.shield(self._begin(self._retire(entry)))

    @asynccontextmanager
    async def through(self, name: str) -> AsyncIterator[Through]:
        """Within it the adapter is in the bank and stays there.

        Raises:
            RefusedError: there is none of that name.
            QueueFullError: the bank is full of adapters in use, and stays so.
            RankwiseError: it cannot be read; of `Admission.read`.
        """
        entry = self._entry(name)
        entry.users += 1  # from here on nobody takes it away
        try:
            if entry.through is None:
                entry.loading = entry.loading or self._begin(self._load(entry))
                await asyncio.shield(entry.loading)  # others may wait for it too
            assert entry.through is not None
            self._held.move_to_end(str(entry.through.key))
            yield entry.through
        finally:
            entry.users -= 1
            self._begin(self._tell())

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise unknown_model(name, self.names)
        return self._entries[name]

    def _check_name(self, name: str, *, replace: bool = False) -> None:
        if checked_name(name) in self.taken:
            raise BankError(f"{name!r} is what the base is called", hint="choose another name")
        if name in self._entries and not replace:
            raise BankError(f"an adapter {name!r} is served already", hint="unload it, or say load_inplace")

    # ── into the bank and out of it ──────────────────────────────────────────────────────────────────────────────

    async def _read(self, folder: Path) -> Admitted:
        async with self._readers:
            return await asyncio.to_thread(self.admission.read, folder)

    def _settled(self, name: str, found: Admitted) -> Parts:
        """Its parts, if they are in nobody's way; alike for all that are alike."""
        for entry in self._entries.values():
            other = entry.parts if entry.name != name else None
            place = other.clash(found.parts) if other is not None else None
            if place is not None:
                raise BankError(
                    f"{name!r} and {entry.name!r} change {place!r} in ways that one bank cannot hold",
                    hint="serve one of them, or merge it into its base (rankwise merge) and serve that",
                )
        return self._parts.setdefault(found.parts, found.parts)

    async def _load(self, entry: _Entry) -> None:
        begin = asyncio.get_running_loop().time()
        try:
            victim = await self._room()
            try:
                entry.through = await self._handed_over(entry, victim)
                self._held[str(entry.through.key)] = entry
            finally:
                self._reserved -= 1
        except Exception:
            self.figures.refused += 1
            raise
        finally:
            entry.loading = None
            self._begin(self._tell())
        self.figures.loads += 1
        self.figures.load_seconds += asyncio.get_running_loop().time() - begin

    async def _handed_over(self, entry: _Entry, victim: str | None) -> Through:
        try:
            found = await self._read(entry.folder)
            entry.parts = self._settled(entry.name, found)
        except BaseException:
            await self._exchanged(victim, None)
            raise
        self._count += 1
        key = f"adapter-{self._count}"
        await self._exchanged(victim, (key, found))
        return Through(key, found.digest)

    async def _room(self) -> str | None:
        """Reserves a place in the bank; gives the name in it of who has to go, which nobody can have any more."""
        if self._waiting >= self.most_waiting:
            raise QueueFullError(f"{self._waiting} requests wait for room for their adapters", hint="try again later")
        self._waiting += 1
        try:
            async with self._changed:
                free = self._changed.wait_for(lambda: self._vacant() or self._unused() is not None)
                await asyncio.wait_for(free, self.patience)
                key = None if self._vacant() else self._unused()
                self._reserved += 1
                if key is not None:
                    self._held.pop(key).through = None
                    self.figures.evictions += 1
                return key
        except (TimeoutError, asyncio.TimeoutError):  # one and the same since Python 3.11
            raise QueueFullError(
                f"all {self.most} adapters that there is room for are in use", hint="try again later, or --max-loaded"
            ) from None
        finally:
            self._waiting -= 1

    def _vacant(self) -> bool:
        return len(self._held) + self._reserved < self.most

    def _unused(self) -> str | None:
        return next((key for key, entry in self._held.items() if not entry.users), None)

    async def _exchanged(self, victim: str | None, comer: tuple[str, Admitted] | None) -> None:
        """One goes from the bank and one comes, between two steps."""
        bank = self.engine.bank

        def work() -> None:
            if victim is not None:
                bank.remove(victim)
            if comer is not None:
                bank.take(comer[0], comer[1].adapter)

        await asyncio.wrap_future(self.engine.between_steps(work, members_only=True))

    async def _retire(self, entry: _Entry) -> None:
        """Waits until nobody uses it, and takes it out of the bank, if it is in it."""
        async with self._changed:
            await self._changed.wait_for(lambda: not entry.users and entry.loading is None)
        through, entry.through = entry.through, None
        if through is not None:
            del self._held[str(through.key)]
            await self._exchanged(through.key, None)
            await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to who waits for it, if anybody still does


class Merged:
    """One adapter, merged into the base: it alone is served, and nothing comes or goes.

    Args:
        through: its name in the bank, merged there already.
    """

    def __init__(self, name: str, folder: Path, through: Through) -> None:
        self._name, self._folder, self._through = name, folder, through
        self.figures = PoolFigures(loads=1)

    @property
    def names(self) -> tuple[str, ...]:
        return (self._name,)

    resident = names

    def folder(self, name: str) -> Path:
        return self._folder

    def __contains__(self, name: str) -> bool:
        return name == self._name

    @asynccontextmanager
    async def through(self, name: str) -> AsyncIterator[Through]:
        if name != self._name:
            raise unknown_model(name, self.names)
        yield self._through

    def offer(self, name: str, folder: Path) -> None:
        raise self._fixed()

    async def add(self, name: str, folder: Path, *, replace: bool = False) -> None:
        raise self._fixed()

    async def remove(self, name: str) -> None:
        raise self._fixed()

    def _fixed(self) -> RefusedError:
        return RefusedError(
            400, f"{self._name!r} is merged into the base and served alone", hint="serve without --merge"
        )
