"""Continuous batching: one thread that owns a model and its bank, and answers many requests a step at a time."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from rankwise.errors import QueueFullError, RankwiseError, RequestError, nearest
from rankwise.jobs.machine import available_bytes
from rankwise.serving.cache import BLOCK, Blocks, blocks_for
from rankwise.serving.held import Held
from rankwise.serving.requests import Finished, Sampling, Token, Wanted
from rankwise.serving.sampling import sampled
from rankwise.serving.scheduler import Listener, Live, Part, Scheduler, Ticket

T = TypeVar("T")

_SHARE = 4  # of the memory that is left, the cache takes one part in so many, where it is not told
_MOST_TOKENS = 1 << 20  # and no more than so many tokens

_log = logging.getLogger(__name__)


class Engine:
    """Answers through any adapters of a bank at once.

    While it runs, the bank and its model are its thread's: whatever changes them goes through `between_steps`.

    Args:
        max_batch_tokens: tokens of a step; longer prompts take several.
        cache_bytes: for keys and values; None: a quarter of the memory that is left.
        max_waiting: requests that may wait before others are turned away.

    Raises:
        ModelError: when started: the model cannot be served.
    """

    def __init__(
        self, bank: Any, *, max_batch_tokens: int = 2048, cache_bytes: int | None = None, max_waiting: int = 256
    ) -> None:
        self.bank = bank
        self.max_batch_tokens, self.max_waiting = max_batch_tokens, max_waiting
        self._cache_bytes = cache_bytes
        self._held: Held | None = None
        self._scheduler = Scheduler(Blocks(0), max_batch_tokens)
        self._news = threading.Condition()  # guards what follows
        self._arrived: deque[Live] = deque()
        self._works: deque[tuple[Callable[[], Any], Future[Any], bool]] = deque()
        self._stopping = self._draining = False
        self._thread: threading.Thread | None = None
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "generated_tokens", "finished", "failed_steps"), 0)
        self._busy = 0.0

    # ── from any thread ──────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Takes hold of the model and begins.

        Raises:
            ModelError: the model cannot be served.
        """
        if self._thread is not None:
            return
        ready: Future[None] = Future()
        self._stopping = self._draining = False
        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._live, args=(ready, threads), name="rankwise-engine", daemon=True)
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise

    def stop(self) -> None:
        """Ends at the next step; who runs or waits is told `cancelled`.  The model is as it was."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits for those it has; False if some are left after `seconds`."""
        until = time.monotonic() + seconds
        with self._news:
            self._draining = True
            while self._unfinished() and self._thread is not None:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._news.wait(min(left, 0.05))
        return True

    def submit(self, wanted: Wanted, listen: Listener) -> Ticket:
        """Queues a request; `listen` is told of every token and of the end, in the engine's thread: be quick.

        Raises:
            RequestError: it can never be answered.
            QueueFullError: too many are waiting, or the engine takes no more.
        """
        self._check(wanted)
        live = Live(wanted, listen)
        with self._news:
            if self._draining or self._stopping or self._thread is None:
                raise QueueFullError("the engine takes no more requests", hint="it is being stopped; ask another one")
            waiting = len(self._arrived) + len(self._scheduler.waiting)
            if waiting >= self.max_waiting:
                raise QueueFullError(f"{waiting} requests are waiting already", hint="try again in a while")
            self._arrived.append(live)
            self._news.notify_all()
        return live.ticket

    def between_steps(self, work: Callable[[], T], *, members_only: bool = False) -> Future[T]:
        """Has something done between two steps, when nothing reads the bank.

        With `members_only` it takes adapters into the bank or out of it, and changes none: the others are not looked
        at again, which with many of them is most of the time.
        """
        done: Future[T] = Future()
        with self._news:
            if self._thread is not None and not self._stopping:
                self._works.append((work, done, members_only))
                self._news.notify_all()
                return done
        _do(work, done)
        return done

    def forget(self) -> None:
        """Beginnings of prompts that nobody uses are not found again; to be called between steps."""
        self._scheduler.blocks.clear()

    def in_use(self) -> frozenset[str]:
        """Adapters that some request runs through or waits for; to be asked between steps."""
        with self._news:
            lives = [*self._arrived, *self._scheduler.waiting, *self._scheduler.running]
        return frozenset(live.wanted.adapter for live in lives if live.wanted.adapter is not None)

    @property
    def figures(self) -> dict[str, float]:
        """Counters since the start, and gauges."""
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting) + len(self._arrived),
            "cache_tokens": blocks.count * BLOCK,
            "cached_tokens": (blocks.count - blocks.available) * BLOCK,
            "prefix_tokens": blocks.idle * BLOCK,
            "prefix_hit_tokens": blocks.hits,
            "busy_seconds": self._busy,
            **self._counts,
        }

    @property
    def alive(self) -> bool:
        """Whether it answers: its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def _unfinished(self) -> bool:
        return bool(self._arrived or self._scheduler.waiting or self._scheduler.running or self._works)

    def _check(self, wanted: Wanted) -> None:
        held, asked = self._held, wanted.max_new_tokens
        if held is None:
            raise QueueFullError("the engine is not running", hint="start it first")
        if not wanted.prompt:
            raise RequestError("an empty prompt", hint="give at least one token")
        if not all(0 <= token < held.words for token in wanted.prompt):
            raise RequestError(f"a prompt with tokens beyond the model's {held.words}")
        if asked < 1:
            raise RequestError(f"max_new_tokens is {asked}", hint="ask for at least one token")
        total, name = len(wanted.prompt) + asked, wanted.adapter
        said = f"{len(wanted.prompt)} tokens of prompt and {asked} of answer"
        if held.context is not None and total > held.context:
            raise RequestError(f"{said} are more than the model's {held.context}", hint="shorten one of the two")
        room = self._scheduler.blocks.count
        if blocks_for(total - 1) > room:
            raise RequestError(f"{said} do not fit the cache of {room * BLOCK} tokens", hint="give it more memory")
        if name is not None and name not in self.bank:
            raise RequestError(f"no adapter {name!r}{nearest(name, self.bank.names)}")
        _check_sampling(wanted.sampling)

    # ── in the engine's thread ───────────────────────────────────────────────────────────────────────────────────

    def _live(self, ready: Future[None], threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            with Held(self.bank) as held:
                self._make_room(held)
                self._held = held
                ready.set_result(None)
                self._serve(held)
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)
        finally:
            self._held = None
            self._leave_all()

    def _make_room(self, held: Held) -> None:
        given = self._cache_bytes
        given = available_bytes(self.bank.model.device) // _SHARE if given is None else given
        count = min(given // (held.bytes_per_token * BLOCK), _MOST_TOKENS // BLOCK)
        if count < 1:
            raise RequestError(
                f"a cache of {given} bytes holds no block of {BLOCK} tokens of {held.bytes_per_token} bytes each",
                hint="give it more memory",
            )
        held.make_room(count * BLOCK)
        self._scheduler = Scheduler(Blocks(count), self.max_batch_tokens)

    def _serve(self, held: Held) -> None:
        while True:
            with self._news:
                while not (self._stopping or self._unfinished()):
                    self._news.notify_all()  # to who waits for the last to finish
                    self._news.wait()
                if self._stopping:
                    return
                works = [self._works.popleft() for _ in range(len(self._works))]
                self._scheduler.waiting.extend(self._arrived)
                self._arrived.clear()
            if works:
                with held.apart(members_only=all(only for *_, only in works)):
                    for work, done, _ in works:
                        _do(work, done)
            begin = time.perf_counter()
            self._dismiss()
            parts = self._scheduler.plan()
            if parts:
                self._step(held, parts)
                self._busy += time.perf_counter() - begin

    def _dismiss(self) -> None:
        """Who is no longer wanted, and whose adapter has gone meanwhile."""
        merged = self.bank.router.merged
        for live in (*self._scheduler.running, *self._scheduler.waiting):
            name = live.wanted.adapter
            if live.ticket.cancelled:
                self._finish(live, Finished("cancelled"))
            elif name is not None and name not in self.bank:
                self._finish(live, Finished("error", f"adapter {name!r} was taken away"))
            elif merged is not None and name != merged:
                self._finish(live, Finished("error", f"adapter {merged!r} is merged into the base"))

    def _step(self, held: Held, parts: Sequence[Part]) -> None:
        try:
            asking = [part.live for part in parts if part.stop == len(part.live.tokens)]
            logits = held.logits([part.chunk() for part in parts])
            said = sampled(logits, [live.wanted.sampling for live in asking], [live.chance for live in asking])
        except Exception as error:  # whatever it is, it is told to those it concerns, and the others go on
            self._counts["failed_steps"] += 1
            _log.exception("a step of %d requests failed", len(parts))
            for part in parts:
                self._finish(part.live, Finished("error", _told(error)), spoilt=True)
            return
        self._counts["steps"] += 1
        self._counts["prompt_tokens"] += sum(
            max(0, min(part.stop, len(part.live.wanted.prompt)) - part.live.computed) for part in parts
        )
        self._scheduler.advance(parts)
        for live, token in zip(asking, said, strict=True):
            self._say(live, token)

    def _say(self, live: Live, token: Token | None) -> None:
        if token is None:
            self._finish(live, Finished("error", "the model's logits are not finite"), spoilt=True)
            return
        live.tokens.append(token.id)
        self._counts["generated_tokens"] += 1
        if not self._tell(live, token):
            self._finish(live, Finished("error", "the listener failed"))
        elif token.id in live.wanted.stops:
            self._finish(live, Finished("stop"))
        elif live.answered >= live.wanted.max_new_tokens:
            self._finish(live, Finished("length"))

    def _finish(self, live: Live, last: Finished, *, spoilt: bool = False) -> None:
        self._scheduler.leave(live, spoilt=spoilt)
        self._counts["finished"] += 1
        self._tell(live, last)

    @staticmethod
    def _tell(live: Live, what: Token | Finished) -> bool:
        try:
            live.listen(what)
        except Exception:  # of whoever listens; the engine goes on
            _log.exception("a listener failed")
            return False
        return True

    def _leave_all(self) -> None:
        with self._news:
            self._stopping = True
            left = [*self._scheduler.running, *self._scheduler.waiting, *self._arrived]
            works = list(self._works)
            self._arrived.clear()
            self._works.clear()
        for live in left:
            self._finish(live, Finished("cancelled", "the engine was stopped"))
        for _, done, _ in works:
            done.cancel()
        with self._news:
            self._news.notify_all()


def _do(work: Callable[[], T], done: Future[T]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)


def _told(error: Exception) -> str:
    if isinstance(error, RankwiseError):
        return error.message
    return f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"


def _check_sampling(sampling: Sampling) -> None:
    wrong = []
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        wrong.append(f"temperature is {sampling.temperature}, expected 0 or more")
    if not 0 < sampling.top_p <= 1:
        wrong.append(f"top_p is {sampling.top_p}, expected more than 0 and at most 1")
    if sampling.top_k < 0:
        wrong.append(f"top_k is {sampling.top_k}, expected 0 (all) or more")
    if sampling.seed is not None and sampling.seed < 0:
        wrong.append(f"seed is {sampling.seed}, expected 0 or more")
    if sampling.logprobs is not None and sampling.logprobs < 0:
        wrong.append(f"logprobs is {sampling.logprobs}, expected 0 or more")
    if wrong:
        raise RequestError("; ".join(wrong))
