"""Packs made by Ray: on the processors of this machine, or on the machines and GPUs of a cluster.

    driver: the search, its study ──▶ packs ──▶ workers, each with the base and the documents loaded once
                                 ◀── what was found, adapters as bytes

Every machine needs rankwise, and the model and the documents under the same names; that they are the same is checked.
Nothing else is shared: a worker's checkpoints are its own.  A pack whose worker dies is given to another one.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, MissingPackageError, TrainingError
from rankwise.jobs.ground import ground_of
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.watch import Quiet
from rankwise.search.pack import Bench, Pack, Tell
from rankwise.search.study import Found
from rankwise.surgery.bank import Bank

_TRIES = 3  # of a pack, as its workers die
_EACH = 4  # processors of a worker, by itself: where a step's products stop getting faster by much

Files = dict[str, dict[str, bytes]]  # of each adapter by its trial's key: name → content


class Spread:
    """Packs made by Ray, for the length of a `with`.

    Args:
        request: what the search stands on (`jobs/ground.py`).
        identity: what workers must see too.
        address: of a cluster; None begins one on this machine.
        workers: how many; 0: one for each GPU, without any one for each four processors.

    Raises:
        MissingPackageError: Ray is not installed.
    """

    def __init__(
        self, request: TrainRequest, identity: dict[str, Any], *, address: str | None = None, workers: int = 0
    ) -> None:
        self.request, self.identity, self.address, self.workers = request, identity, address, workers
        self._began = False
        self._alive: list[Any] = []

    def __enter__(self) -> Spread:
        ray = _ray()
        if not ray.is_initialized():
            heard = signal.getsignal(signal.SIGTERM)
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False, configure_logging=False)
            if heard is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, heard)  # Ray's own ends the program without a word
            self._began = True
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
        self.workers = self.workers or gpus or max(1, cpus // _EACH)
        threads = max(1, cpus // self.workers)
        needs: dict[str, Any] = {"num_cpus": threads} | ({"num_gpus": gpus / self.workers} if gpus else {})
        self._worker = ray.remote(**needs)(_Worker)
        self._told = (self.request.model_dump(exclude_unset=True), self.identity, threads)
        return self

    def __exit__(self, *_: object) -> None:
        ray = _ray()
        for worker in self._alive:
            ray.kill(worker)
        if self._began:
            ray.shutdown()

    def made(self, packs: Sequence[Pack], adapters: Path, tell: Tell) -> Iterator[tuple[Pack, list[Found]]]:
        """As `Packs.made`; all packs at once, as many as there are workers.

        Raises:
            DataError: a worker sees another model or other documents.
            TrainingError: a pack's workers died, one after the other.
        """
        ray = _ray()
        queue, tries, running = list(packs), dict[str, int](), dict[Any, tuple[Pack, Any]]()
        new = min(self.workers, len(packs)) - len(self._alive)
        idle = [*self._alive, *(self._begin() for _ in range(new))]
        done, title = 0, f"{packs[0].step}: {len(packs)} packs on {self.workers} workers" if packs else ""
        while queue or running:
            while queue and idle:
                pack, worker = queue.pop(0), idle.pop()
                running[worker.train.remote(pack)] = pack, worker
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            pack, worker = running.pop(ready)
            try:
                found, files = ray.get(ready)
            except ray.exceptions.RayActorError as death:
                tries[pack.name] = tries.get(pack.name, 0) + 1
                if tries[pack.name] == _TRIES:
                    said = f"{pack.title}: {_TRIES} workers died over it, the last with: {death}"
                    raise TrainingError(said, hint="a smaller --pack takes less memory") from death
                self._alive.remove(worker)
                queue.append(pack)
                idle.append(self._begin())
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            _write(files, adapters)
            done += 1
            tell(title, done / len(packs))
            yield pack, found
            idle.append(worker)

    def _begin(self) -> Any:
        worker = self._worker.remote(*self._told)
        self._alive.append(worker)
        return worker


class _Worker:
    """In a process of Ray's: a bench with the base and the documents."""

    def __init__(self, request: dict[str, Any], identity: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        ground = ground_of(TrainRequest(**request), Quiet())
        bank = Bank(ground.subject.base.model)
        own = ground.identity(bank)
        self.astray = [name for name, value in own.items() if value != identity[name]]
        self.place = Path(tempfile.mkdtemp(prefix="rankwise-"))
        self.bench = Bench(bank, ground.parts, ground.request.loop, self.place / "packs")

    def train(self, pack: Pack) -> tuple[list[Found], Files]:
        """Of what a pack gave, and the adapters that are to be kept."""
        if self.astray:
            said = f"a worker sees otherwise than the search: {', '.join(self.astray)}"
            raise DataError(said, hint="give every machine the same model and the same files")
        adapters = self.place / "adapters"
        found = self.bench.train(pack, adapters, lambda title, share: None)
        keys = [trial.key for trial in pack.trials if (adapters / trial.key).exists()]
        files = {key: {path.name: path.read_bytes() for path in (adapters / key).iterdir()} for key in keys}
        shutil.rmtree(self.place)  # nobody will ask for it again
        return found, files


def _write(files: Files, adapters: Path) -> None:
    for key, own in files.items():
        (adapters / key).mkdir(parents=True, exist_ok=True)
        for name, content in own.items():
            (adapters / key / name).write_bytes(content)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError("--engine ray needs Ray", hint="pip install 'rankwise[ray]'") from error
    return ray
