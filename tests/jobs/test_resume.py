"""Runs stopped and killed from outside, as whole processes, and gone on with: nothing may be lost and no bit differ."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from rankwise.errors import RunFolderError
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from tests.jobs.world import lines, read

# Long enough to be stopped on the way on a busy machine, with dropout, whose masks must go on where they were.
SETTINGS = {"max_steps": 240, "batch_tokens": 150, "save_every": 20, "evaluate_every": 60, "dropout": 0.1, "rank": 4}
SETTINGS["add_tokens"] = ("that is",)  # whose rows must go on where they were too
STOPPED_AT = 30  # steps, with a checkpoint behind and most of the run ahead
PATIENCE = 120  # seconds


class Stopped(NamedTuple):
    code: int
    out: str
    err: str


def asked(world: Path, out: Path, **more) -> TrainRequest:
    files = {"model": str(world / "llama"), "data": str(world / "train.jsonl"), "valid": str(world / "valid.jsonl")}
    return TrainRequest(**files, out=out, **SETTINGS, targets=r"re:.*[qv]_proj", dtype="float32", **more)


def begin(command: str) -> subprocess.Popen:
    """A real process; one thread, as here, because other sums give other bits."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": scripts}
    return subprocess.Popen(
        shlex.split(command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, f"the run ended before it could be stopped: {process.stderr.read()}"
        assert time.monotonic() < until
        time.sleep(0.002)


def ending(process: subprocess.Popen) -> Stopped:
    out, err = process.communicate(timeout=PATIENCE)
    return Stopped(process.returncode, out, err)


def steps_done(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b'"kind": "step"') if metrics.exists() else 0


def without_times(out: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The run that nobody disturbs."""
    run_training(asked(world, world / "whole"), Quiet())
    return world / "whole"


@pytest.fixture(scope="module")
def stopped(world) -> dict[int, Stopped]:
    """Two runs side by side, one asked to stop and one killed; a second process tries each folder while it is busy."""
    outs = {number: world / number.name for number in (signal.SIGTERM, signal.SIGKILL)}
    processes = {number: begin(asked(world, out).command()) for number, out in outs.items()}
    going = set(outs)
    while going:
        wait_for(processes[min(going)], lambda: any(steps_done(outs[number]) >= STOPPED_AT for number in going))
        for number in [number for number in going if steps_done(outs[number]) >= STOPPED_AT]:
            with pytest.raises(RunFolderError, match="another run is writing here"):
                run_training(asked(world, outs[number]), Quiet())
            processes[number].send_signal(number)
            going.remove(number)
    return {number: ending(process) for number, process in processes.items()}


def assert_equal(out: Path, whole: Path) -> None:
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert read(out / "rankwise.json")["digest"] == read(whole / "rankwise.json")["digest"]
    assert read(out / "evaluation.json") == read(whole / "evaluation.json")
    assert without_times(out) == without_times(whole)


def test_a_stopped_run_has_saved_and_says_the_exact_command_to_go_on_with(world, stopped):
    out, ran = world / "SIGTERM", stopped[signal.SIGTERM]
    assert (ran.code, ran.out) == (143, "")
    assert ran.err.endswith(f"saved.  Go on with:\n  {asked(world, out).command()} --resume\n")
    assert "Traceback" not in ran.err
    step = max(int(place.name[-6:]) for place in (out / "checkpoints").glob("step-*"))
    assert step == steps_done(out) < SETTINGS["max_steps"]


def test_a_killed_run_resumed_equals_one_that_was_not_to_the_bit(world, stopped, whole):
    assert stopped[signal.SIGKILL].code == -signal.SIGKILL
    assert steps_done(world / "SIGKILL") < SETTINGS["max_steps"]
    run_training(asked(world, world / "SIGKILL", resume=True), Quiet())
    assert_equal(world / "SIGKILL", whole)


def test_a_run_gone_on_with_by_that_command_and_stopped_again_after_its_last_step_still_ends_whole(
    world, stopped, whole
):
    """Steps, comparison and report each in a process of its own, and no bit differs."""
    out = world / "SIGTERM"
    command = re.search(r"Go on with:\n  (.*)\n", stopped[signal.SIGTERM].err)[1]
    process = begin(command)
    wait_for(process, (out / "adapter_config.json").exists)
    process.send_signal(signal.SIGINT)
    again = ending(process)
    assert again.code == 130
    assert again.err.endswith(f"Go on with:\n  {command}\n")
    assert steps_done(out) == SETTINGS["max_steps"]
    assert not (out / "README.md").exists()
    summary = run_training(asked(world, out, resume=True), Quiet())
    assert_equal(out, whole)
    assert summary["training"]["steps"] == SETTINGS["max_steps"]
    assert summary["verdict"] in (out / "README.md").read_text(encoding="utf-8")
