"""Packs made by Ray on two workers: the same answers as here, and a worker that dies costs nothing but time."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Run
from rankwise.errors import DataError
from rankwise.formats.peft import read_adapter
from rankwise.jobs.ground import ground_of
from rankwise.jobs.search import SearchRequest, run_search
from rankwise.jobs.spread import Spread, _Worker
from rankwise.jobs.watch import Quiet
from rankwise.search.pack import Bench, Pack
from rankwise.search.study import Candidate, Trial
from rankwise.surgery.bank import Bank
from tests.jobs.world import Listener, request, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),  # of Ray's own
]

STEPS = 12


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        part: str(write_rows(folder / f"{part}.jsonl", range(start, start + count)))
        for part, start, count in (("train", 100, 24), ("valid", 500, 10), ("test", 700, 10))
    }


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def asked(world, rows, out, **own):
    settings = {"lr": 2e-2, "rank": 4, "alpha": 8, "max_steps": STEPS, "dtype": "float32"}
    return request(world / "llama", rows["train"], out, valid=rows["valid"], test=rows["test"], **{**settings, **own})


def packs():
    def trial(rank, seed, steps):
        spec = LoraSpec(rank=rank, alpha=8, targets="all-linear")
        return Trial(Candidate(f"rank {rank}", spec, Run(lr=2e-2)), seed, steps)

    return [
        Pack("ladder", (trial(2, 0, STEPS), trial(4, 0, STEPS))),
        Pack("noise", (trial(2, 1, 6),)),
        Pack("confirm", (trial(2, 2, STEPS),)),
    ]


def on_ground(world, rows, out):
    ground = ground_of(asked(world, rows, out), Quiet())
    bank = Bank(ground.subject.base.model)
    return ground, bank


def test_two_workers_find_what_is_found_here(cluster, world, rows, tmp_path):
    ground, bank = on_ground(world, rows, tmp_path / "s")
    here = by_name(_bench(ground, bank, tmp_path).made(packs(), tmp_path / "here", _silent))
    with Spread(ground.request, ground.identity(bank), workers=2) as spread:
        there = by_name(spread.made(packs(), tmp_path / "there", _silent))
    assert here.keys() == there.keys() == {pack.name for pack in packs()}
    for pack in packs():
        for ours, theirs in zip(here[pack.name], there[pack.name], strict=True):
            assert ours.status == theirs.status == "finished"
            np.testing.assert_allclose(theirs.choose, ours.choose, rtol=1e-5)
            assert (ours.confirm is None) == (theirs.confirm is None) == (pack.step != "confirm")
            if ours.confirm is not None:
                np.testing.assert_allclose(theirs.confirm, ours.confirm, rtol=1e-5)
    kept = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert (
        sorted(path.name for path in (tmp_path / "there").iterdir()) == kept == sorted(t.key for t in packs()[0].trials)
    )
    for key in kept:
        ours, theirs = (read_adapter(tmp_path / where / key) for where in ("here", "there"))
        for path, factors in ours.sites.items():
            np.testing.assert_allclose(theirs.sites[path].delta(), factors.delta(), atol=1e-6)


def both_workers() -> list[int]:
    """Their processes; the second may still be starting when the first has made a pack."""
    for _ in range(600):
        said = {int(p.parent.name): p for p in Path("/proc").glob("[0-9]*/cmdline")}
        found = [process for process, line in said.items() if line.exists() and b"ray::_Worker" in line.read_bytes()]
        if len(found) == 2:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{len(found)} workers after a minute")


def test_a_worker_that_dies_is_replaced_and_its_pack_made_by_another(cluster, world, rows, tmp_path):
    ground, bank = on_ground(world, rows, tmp_path / "s")
    with Spread(ground.request, ground.identity(bank), workers=2) as spread:
        made = spread.made(packs(), tmp_path / "there", _silent)
        first, _ = next(made)
        for process in both_workers():
            os.kill(process, signal.SIGKILL)
        rest = by_name(made)
    assert {first.name, *rest} == {pack.name for pack in packs()}
    assert all(one.status == "finished" for found in rest.values() for one in found)


def test_workers_that_see_other_documents_are_refused(cluster, world, rows, tmp_path):
    ground, bank = on_ground(world, rows, tmp_path / "s")
    other = ground.identity(bank) | {"documents": ["of", "somebody", "else"]}
    with Spread(ground.request, other, workers=1) as spread, pytest.raises(DataError, match="documents"):
        list(spread.made(packs()[:1], tmp_path / "there", _silent))


def test_a_search_on_two_workers_answers_as_one_here(cluster, world, rows, tmp_path):
    found = {
        engine: run_search(
            SearchRequest(budget="express", ranks="2,4", until="confirm", **own),
            asked(world, rows, tmp_path / engine),
            Listener(),
        )
        for engine, own in (("local", {}), ("ray", {"engine": "ray", "workers": 2}))
    }
    local, ray = (found[engine]["recommendation"] for engine in ("local", "ray"))
    assert (local["rank"], local["kind"]) == (ray["rank"], ray["kind"])
    assert local["lr"] == pytest.approx(ray["lr"])
    assert not list((tmp_path / "ray" / "packs").glob("*"))


def test_a_worker_leaves_nothing_behind_and_goes_on(world, rows, tmp_path):
    ground, bank = on_ground(world, rows, tmp_path / "s")
    worker = _Worker(ground.request.model_dump(exclude_unset=True), ground.identity(bank), 1)
    for pack in packs():
        found, _ = worker.train(pack)
        assert all(one.status == "finished" for one in found)
        assert not worker.place.exists()


def by_name(made):
    return {pack.name: found for pack, found in made}


def _bench(ground, bank, place):
    return Bench(bank, ground.parts, ground.request.loop, place / "packs")


def _silent(title, share):
    pass
