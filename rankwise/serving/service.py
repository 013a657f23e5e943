"""A server from files to an open port, and its end: what `rankwise serve` does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from pydantic import Field, field_validator, model_validator

from rankwise.adapters.adapter import checked_name
from rankwise.data.template import Template
from rankwise.errors import RankwiseError, SpecError, listing
from rankwise.frozen.load import Base, load_base
from rankwise.jobs.evaluate import as_trained
from rankwise.jobs.watch import Watch
from rankwise.kernels.heap import share_one_heap
from rankwise.kernels.sizes import Storage
from rankwise.serving.admission import Admission
from rankwise.serving.app import Server, build_app
from rankwise.serving.engine import Engine
from rankwise.serving.guard import Door, is_loopback
from rankwise.serving.pool import Merged, Pool, Through
from rankwise.settings import Settings
from rankwise.surgery.bank import Bank

Count = Annotated[int, Field(ge=1)]
Ready = Callable[[dict[str, Any]], None]

_log = logging.getLogger(__name__)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ADAPTER = "adapter_config.json"


class ServeRequest(Settings):
    """What is to be served, and how.

    Attributes:
        adapters: folders by name; read before the first request.
        adapters_dir: a folder of adapters' folders, which are served by these names, read when they are asked for;
            what is loaded over HTTP has to lie in it.
        merge: the one adapter that is served, merged into the base.
        patience: seconds that a request waits for room for its adapter.
        drain: seconds that requests may take to end after SIGTERM.
    """

    model: str
    adapters: Mapping[str, Path] = Field(default_factory=dict)
    adapters_dir: Path | None = None
    allow_any_path: bool = False
    merge: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: str | None = None
    max_loaded: Count = 32
    max_batch_tokens: Count = 2048
    max_waiting: Count = 256
    max_tokens: Count = 4096
    max_body: Count = 4 << 20
    cache_bytes: Count | None = None
    patience: Annotated[float, Field(gt=0)] = 30.0
    drain: Annotated[float, Field(ge=0)] = 30.0
    dtype: str = "auto"
    device: str = "auto"
    storage: Storage | None = None
    force: bool = False

    @field_validator("api_key")
    @classmethod
    def _key_is_one(cls, key: str | None) -> str | None:
        if key is not None and (not key.strip() or not key.isascii() or not key.isprintable()):
            raise ValueError("a key is printable ASCII and not empty")
        return key

    @model_validator(mode="after")
    def _agrees(self) -> ServeRequest:
        problems = []
        if not is_loopback(self.host) and self.api_key is None:
            problems.append(f"host {self.host} can be reached from other machines, and there is no --api-key")
        if self.merge is not None and self.merge not in self.adapters:
            problems.append(f"merge {self.merge!r} is none of the adapters")
        if self.merge is not None and (len(self.adapters) > 1 or self.adapters_dir is not None):
            problems.append("a merged adapter is served alone")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Service:
    """A model loaded and a port taken.

    Raises:
        SpecError: the port cannot be taken.
        RankwiseError: of loading.
    """

    def __init__(self, asked: ServeRequest, watch: Watch) -> None:
        share_one_heap()
        self.asked, self.watch = asked, watch
        self._socket = _bound(asked.host, asked.port)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        try:
            with watch.stage(f"loading {asked.model}"):
                storage = as_trained(list(asked.adapters.values()), {"storage": asked.storage})["storage"]
                self.base = load_base(asked.model, dtype=asked.dtype, device=asked.device, storage=storage)
            self.template = Template(self.base.tokenizer)
        except BaseException:
            self._socket.close()
            raise
        self.bank = Bank(self.base.model)
        room = {"max_batch_tokens": asked.max_batch_tokens, "max_waiting": asked.max_waiting}
        self.engine = Engine(self.bank, cache_bytes=asked.cache_bytes, **room)
        hosts = () if not is_loopback(asked.host) else {*_LOOPBACK, asked.host}
        self.door = Door(asked.api_key, hosts, asked.max_body)
        self.port = int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        host = f"[{self.asked.host}]" if ":" in self.asked.host else self.asked.host
        return f"http://{host}:{self.port}"

    def run(self, ready: Ready) -> None:
        """Serves until it is told to stop; `ready` is told what is served once it is."""
        try:
            asyncio.run(self._run(ready))
        finally:
            self._socket.close()
            self.engine.stop()
            self.bank.close()

    def close(self) -> None:
        """Asks for the end, from any thread: requests that are being answered are answered."""
        if self._loop is not None and self._closing is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._closing.set)

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self, ready: Ready) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        admission = Admission(self.bank, self.base, self.template.digest, force=self.asked.force)
        server = await self._server(admission)
        http = _Http(build_app(server), lambda: ready(self._told(server)))
        with self._hearing(http):
            serving = self._loop.create_task(http.serve(sockets=[self._socket]))
            ending = self._loop.create_task(self._end(server, http))
            await serving
            ending.cancel()

    async def _server(self, admission: Admission) -> Server:
        asked, base = self.asked, _base_name(self.base)
        if asked.merge is not None:
            pool: Pool | Merged = self._merged(admission, asked.merge, asked.adapters[asked.merge])
            names: tuple[str, ...] = ()
        else:
            names = tuple(dict.fromkeys((base, "base")))
            pool = Pool(self.engine, admission, resident=asked.max_loaded, taken=names, patience=asked.patience)
        await asyncio.to_thread(self.engine.start)
        if isinstance(pool, Pool):
            await self._fill(pool)
        limits: dict[str, Any] = {"most_tokens": asked.max_tokens, "adapters_dir": asked.adapters_dir}
        return Server(
            self.engine, pool, self.base, self.template, self.door, names, any_path=asked.allow_any_path, **limits
        )

    def _merged(self, admission: Admission, name: str, folder: Path) -> Merged:
        checked_name(name)
        found = admission.read(folder)
        self.bank.take(name, found.adapter)
        self.bank.merge(name)
        return Merged(name, folder, Through(name, found.digest))

    async def _fill(self, pool: Pool) -> None:
        """Reads the adapters that were named, and offers those in the folder.

        Raises:
            SpecError: lists every one that cannot be served.
        """
        problems = []
        with self.watch.stage("checking the adapters") as advance:
            for done, (name, folder) in enumerate(self.asked.adapters.items(), start=1):
                try:
                    await pool.add(name, folder)
                except RankwiseError as error:
                    problems.append(f"{name}: {error.message}")
                advance(done / len(self.asked.adapters))
        if problems:
            raise SpecError(f"{len(problems)} adapters cannot be served:\n{listing(problems)}")
        for folder in _folders(self.asked.adapters_dir):
            try:
                if folder.name not in pool:
                    pool.offer(folder.name, folder)
            except RankwiseError as error:
                self.watch.say(f"{folder} is not served: {error.message}")

    def _told(self, server: Server) -> dict[str, Any]:
        return {
            "url": self.url,
            "host": self.asked.host,
            "port": self.port,
            "base": next(iter(server.base_names), None),
            "adapters": list(server.pool.names),
            "merged": self.asked.merge,
            "max_loaded": self.asked.max_loaded,
            "key": self.asked.api_key is not None,
        }

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _hearing(self, http: _Http) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask for the end; a second one does not wait."""
        loop, closing = self._loop, self._closing
        assert loop is not None
        assert closing is not None

        def hear() -> None:
            if closing.is_set():
                http.should_exit = http.force_exit = True
            closing.set()

        heard = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.getsignal(number) for number in heard}
        for number in heard:
            loop.add_signal_handler(number, hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    async def _end(self, server: Server, http: _Http) -> None:
        assert self._closing is not None
        await self._closing.wait()
        self.door.closing = True
        until = asyncio.get_running_loop().time() + self.asked.drain
        while server.active and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        if server.active:
            _log.warning("%d requests are cut off", server.active)
        await asyncio.to_thread(self.engine.stop)  # whoever is left is told so
        http.should_exit = True


class _Http(uvicorn.Server):
    """uvicorn, which leaves signals to `Service`."""

    def __init__(self, app: Any, ready: Callable[[], None]) -> None:
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "lifespan": "off"}
        super().__init__(uvicorn.Config(app, http="h11", ws="none", timeout_graceful_shutdown=5, **quiet))
        self.ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        reason = error.strerror or error
        raise SpecError(f"{host}:{port} cannot be taken: {reason}", hint="--port 0 takes a free one") from None
    found.listen(2048)
    return found


def _base_name(base: Base) -> str:
    path = Path(base.name)
    return path.name if path.is_dir() else base.name


def _folders(root: Path | None) -> list[Path]:
    if root is None:
        return []
    if not root.is_dir():
        raise SpecError(f"{root}: no such folder", hint="--adapters-dir is a folder of adapters' folders")
    return sorted(folder for folder in root.iterdir() if (folder / _ADAPTER).is_file())
