"""A run's folder is held by one run at a time, loses nothing to a crash, and outlives a full disk."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from rankwise.engine.folder import RunFolder, held_folder
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.engine.state import Checkpoint, newest_checkpoint, save_checkpoint
from rankwise.errors import RunFolderError
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import spec
from tests.models import tiny

HOLD = """
import sys
from pathlib import Path
from rankwise.engine.folder import held_folder
with held_folder(Path(sys.argv[1]), resume=False) as folder:
    folder.write_event({"kind": "event"})
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_in(folder: Path) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


def test_a_folder_is_held_against_other_processes_until_they_end_or_are_killed(tmp_path):
    with another_process_in(tmp_path) as other:
        for resume in (False, True):
            with pytest.raises(RunFolderError, match="another run is writing"), held_folder(tmp_path, resume=resume):
                pass
        other.kill()
        other.wait()
        with held_folder(tmp_path, resume=True) as folder:
            assert json.loads(folder.metrics.read_text()) == {"kind": "event"}


def test_a_folder_is_let_go_after_an_error_and_after_a_refusal(tmp_path):
    with held_folder(tmp_path, resume=False) as folder:
        folder.write_event({})
    with pytest.raises(KeyError), held_folder(tmp_path, resume=True):
        raise KeyError
    for _ in range(2):
        with pytest.raises(RunFolderError, match="holds a run already"), held_folder(tmp_path, resume=False):
            pass
    with held_folder(tmp_path, resume=True):
        pass


def test_nothing_of_others_is_overwritten(tmp_path):
    for name in ("letter.txt", "adapter_config.json", "checkpoints"):
        place = tmp_path / name
        place.mkdir()
        (place / name).write_text("mine")
        with pytest.raises(RunFolderError, match="nothing was overwritten"), held_folder(place, resume=False):
            pass
        assert (place / name).read_text() == "mine"


def test_a_folder_is_made_with_those_above_it(tmp_path):
    with held_folder(tmp_path / "a" / "b", resume=False) as folder:
        assert not folder.begun
    assert (tmp_path / "a" / "b").is_dir()


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_are_lines_and_those_after_a_mark_can_be_taken_back(tmp_path):
    folder, events = RunFolder(tmp_path), [{"n": 1, "rows": ["第一行.jsonl:3"]}, {"n": 2}]
    for event in events:
        assert folder.write_event(event) is None
    mark = folder.metrics_size()
    folder.write_event({"n": 3})
    with folder.metrics.open("a") as file:
        file.write('{"half a li')  # where a run was killed
    folder.cut_metrics(mark)
    assert [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()] == events
    folder.cut_metrics(10_000)
    assert folder.metrics_size() == mark


def test_numbers_that_json_does_not_know_are_written_as_null(tmp_path):
    with held_folder(tmp_path / "run", resume=False) as folder:
        event = {"loss": np.nan, "row": [np.float32(0.5), -np.inf], "count": np.int64(3), "in": {"x": np.nan}}
        assert folder.write_event(event) is None
        (line,) = folder.metrics.read_text().splitlines()
    assert json.loads(line) == {"loss": None, "row": [0.5, None], "count": 3, "in": {"x": None}}


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A disk that is full, as far as this process can tell: Linux refuses to make a file longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_for_which_there_is_no_room_is_lost_whole_with_its_reason(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_event({"n": 1})
    with files_no_larger_than(folder.metrics_size() + 20):
        assert folder.write_event({"n": "x" * 100}) == "File too large"
    folder.write_event({"n": 2})
    assert [json.loads(line)["n"] for line in folder.metrics.read_text().splitlines()] == [1, 2]


def learn(out: Path | None, **settings) -> tuple[dict[str, torch.Tensor], list[dict]]:
    told: list[dict] = []
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec("all-linear"))
        settings = {"loop": Loop(batch_tokens=40, evaluate_every=2), "observe": told.append, **settings}
        if out is None:
            train(bank, {"a": Run(lr=5e-3)}, random_corpus([7, 9, 5, 12] * 4), **settings)
        else:
            with held_folder(out, resume=False) as folder, files_no_larger_than(settings.pop("room")):
                train(bank, {"a": Run(lr=5e-3)}, random_corpus([7, 9, 5, 12] * 4), out=folder, **settings)
        return {path: tensor.detach().clone() for path, tensor in bank.named_parameters("a")}, told


@pytest.mark.parametrize(("room", "what"), [(10_000, "checkpoint failed"), (0, "line of metrics lost")])
def test_a_full_disk_stops_no_training_and_is_told(tmp_path, room, what):
    """The checkpoints do not fit; in the second case nothing does."""
    want, _ = learn(None)
    found, told = learn(tmp_path, room=room)
    assert all(torch.equal(found[path], want[path]) for path in want)
    events = [event for event in told if event.get("what") == what]
    assert events
    assert all(event["message"] for event in events)
    assert not list((tmp_path / "checkpoints").iterdir())


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


def checkpoint(step: int, values: int = 5000) -> Checkpoint:
    return Checkpoint(step, {"x": step}, {"adapter-a": {"w": torch.full((values,), float(step))}})


def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint_leaves_the_older_ones(tmp_path):
    """The real thing: safetensors has an error of its own for it, which is no OSError."""
    save_checkpoint(tmp_path / "c", checkpoint(1), keep=1)
    for size in (0, 200, 10_000):
        with files_no_larger_than(size), pytest.raises(RunFolderError, match=r"it takes 20,000 bytes, [\d,]+ are free"):
            save_checkpoint(tmp_path / "c", checkpoint(2), keep=1)
        assert [place.name for place in (tmp_path / "c").iterdir()] == ["step-000001"]
    assert newest_checkpoint(tmp_path / "c")[0].step == 1


SAVE = """
import sys, torch
from pathlib import Path
from rankwise.engine.state import Checkpoint, save_checkpoint
for step in range(1, 100_000):
    tensors = {"adapter-a": {"w": torch.full((200_000,), float(step))}, "rng": {"cpu": torch.arange(9)}}
    save_checkpoint(Path(sys.argv[1]), Checkpoint(step, {"x": step}, tensors), keep=1)
    print(step, flush=True)
"""


def test_a_process_killed_in_the_middle_of_a_checkpoint_leaves_the_one_before(tmp_path):
    """It does nothing but write checkpoints, so the kill comes into one of them."""
    with subprocess.Popen([sys.executable, "-c", SAVE, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        for _ in range(12):
            last = int(other.stdout.readline())
        os.kill(other.pid, signal.SIGKILL)
        rest = other.stdout.read().split()
    last = int(rest[-1]) if rest else last
    found, _ = newest_checkpoint(tmp_path)
    assert found.step in (last, last + 1)
    assert torch.equal(found.tensors["adapter-a"]["w"], torch.full((200_000,), float(found.step)))
    save_checkpoint(tmp_path, checkpoint(found.step + 1), keep=1)
    assert [place.name for place in tmp_path.iterdir()] == [f"step-{found.step + 1:06d}"]


def test_what_a_killed_run_left_half_written_is_cleared_by_the_next_checkpoint(tmp_path):
    for name in (".step-000003.part", ".step-000009.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter-a.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, checkpoint(4), keep=2)
    assert [place.name for place in tmp_path.iterdir()] == ["step-000004"]


def test_a_step_that_is_saved_twice_never_leaves_a_moment_without_a_checkpoint(tmp_path):
    place = save_checkpoint(tmp_path, checkpoint(4), keep=1)
    before = place.stat().st_ino
    assert save_checkpoint(tmp_path, checkpoint(4), keep=1) == place
    assert place.stat().st_ino == before, "it was taken away and written again"
    (place / "adapter-a.safetensors").write_bytes(b"damaged")
    save_checkpoint(tmp_path, checkpoint(4), keep=1)
    assert newest_checkpoint(tmp_path)[1] == []


def test_a_damaged_newest_checkpoint_does_not_crowd_out_those_written_after_it(tmp_path):
    for step in (4, 8):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    (tmp_path / "step-000008" / "state.json").unlink()
    for keep in (2, 1):  # the run went on from step 4
        save_checkpoint(tmp_path, checkpoint(5), keep=keep)
        assert newest_checkpoint(tmp_path)[0].step == 5


def test_any_damage_to_a_manifest_is_noticed(tmp_path):
    place = save_checkpoint(tmp_path, checkpoint(1, values=8), keep=1)
    path = place / "manifest.json"
    data = path.read_bytes()
    whole = [data[:size] for size in range(0, len(data), 7)]
    whole += [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data))]
    whole += [
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        b'{"schema": 1, "files": []}',
        b'{"schema": 1, "files": {"state.json": 3}}',
    ]
    for damaged in whole:
        path.write_bytes(damaged)
        with pytest.raises(RunFolderError, match="step-000001"):
            newest_checkpoint(tmp_path)
    path.write_bytes(data)
    assert newest_checkpoint(tmp_path)[0].step == 1
