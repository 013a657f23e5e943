"""What this process takes, with and without weights in it."""

import subprocess
import sys

import pytest
import torch

from rankwise.frozen.load import load_base
from rankwise.planning import process
from tests.jobs.world import write_model

pytestmark = pytest.mark.skipif(not process.resident_bytes(), reason="this system does not say")


def test_resident_memory_follows_what_is_taken():
    before = process.resident_bytes()
    held = torch.ones(64 * 2**20)
    assert process.resident_bytes() - before == pytest.approx(held.nbytes, rel=0.1)
    assert process.resident_without(held.nbytes) == pytest.approx(before, rel=0.05)
    assert process.most_resident_bytes() >= process.resident_bytes()


def test_weights_that_are_mapped_count_as_far_as_they_were_read(tmp_path):
    folder = write_model(tmp_path, hidden_size=512, intermediate_size=8192)
    load_base(folder, dtype="float32")  # what loading itself brings along is there from now on
    before = process.resident_bytes()
    base = load_base(folder, dtype="float32")
    weights = sum(parameter.nbytes for parameter in base.model.parameters())
    assert weights > 100e6
    assert process.resident_without(weights) == pytest.approx(before, rel=0.2)


def test_the_most_is_this_program_s_own_and_not_its_parent_s():
    held = torch.ones(100 * 2**20)
    script = "from rankwise.planning.process import most_resident_bytes; print(most_resident_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < held.nbytes / 2


def test_without_a_report_the_assumption_stands(tmp_path, monkeypatch):
    for name in ("_STATUS", "_REPORT"):
        monkeypatch.setattr(process, name, tmp_path / "none")
    assert (process.resident_bytes(), process.most_resident_bytes()) == (0, 0)
    assert process.resident_without(10**9) == process.ASSUMED
