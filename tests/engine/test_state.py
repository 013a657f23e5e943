import json

import pytest
import torch

from rankwise.engine import state
from rankwise.engine.state import Checkpoint, newest_checkpoint, save_checkpoint
from rankwise.errors import RunFolderError


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step, {"x": step}, {"adapter-a.b": {"w": torch.full((50,), float(step))}, "rng": {"cpu": torch.arange(3)}}
    )


def test_what_is_saved_comes_back(tmp_path):
    save_checkpoint(tmp_path / "c", checkpoint(7), keep=2)
    found, problems = newest_checkpoint(tmp_path / "c")
    assert (found.step, found.numbers["x"], problems) == (7, 7, [])
    assert torch.equal(found.tensors["adapter-a.b"]["w"], torch.full((50,), 7.0))
    assert torch.equal(found.tensors["rng"]["cpu"], torch.arange(3))


def test_old_ones_go_and_the_newest_is_by_number(tmp_path):
    for step in (5, 999_999, 1_000_000):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert newest_checkpoint(tmp_path)[0].step == 1_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-999999"]


def damage_flip(place):
    path = place / "adapter-a.b.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage_cut(place):
    path = place / "state.json"
    path.write_bytes(path.read_bytes()[:-2])


def damage_manifest(place):
    (place / "manifest.json").unlink()


def damage_missing(place):
    (place / "rng.safetensors").unlink()


def damage_schema(place):
    (place / "manifest.json").write_text(json.dumps({"schema": 99, "files": {}}))


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_manifest, damage_missing, damage_schema])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step), keep=3)
    damage(tmp_path / "step-000002")
    found, problems = newest_checkpoint(tmp_path)
    assert found.step == 1
    assert len(problems) == 1
    assert "step-000002" in problems[0]


def test_half_written_ones_do_not_count(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    (tmp_path / ".step-000009.part").mkdir()
    assert newest_checkpoint(tmp_path)[0].step == 1


def test_nothing_to_resume_says_so(tmp_path):
    with pytest.raises(RunFolderError, match="no checkpoint to resume from"):
        newest_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_older_checkpoints_and_no_rubbish(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c", checkpoint(1), keep=2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(RunFolderError, match="it takes 224 bytes"):
        save_checkpoint(tmp_path / "c", checkpoint(2), keep=2)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-000001"]
    assert newest_checkpoint(tmp_path / "c")[0].step == 1
