import pytest

from rankwise.errors import RunFolderError
from rankwise.jobs.quickstart import TEST, TRAIN, VALID, run_quickstart
from tests.jobs.world import SHORT, Listener, lines


def test_it_goes_from_nothing_to_a_comparison_on_modules_it_has_not_seen(world, tmp_path):
    told = Listener()
    short = {**SHORT, "max_steps": 2, "max_length": 320}  # the tiny tokenizer makes many tokens of a function
    found = run_quickstart(tmp_path / "out", told, str(world / "llama"), **short)
    rows = {name: lines(tmp_path / "out" / "data" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert {name: len(some) for name, some in rows.items()} == {"train": TRAIN, "valid": VALID, "test": TEST}
    modules = {name: {row["origin"].split(":")[0] for row in some} for name, some in rows.items()}
    assert not modules["train"] & (modules["valid"] | modules["test"])
    assert found["evaluation"]["documents"] > 1
    assert (tmp_path / "out" / "run" / "report.html").exists()
    assert found["data"] == str(tmp_path / "out" / "data")
    assert found["model"] == str(world / "llama")


def test_a_folder_that_is_not_empty_is_left_alone(world, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(RunFolderError, match="nothing was overwritten"):
            run_quickstart(out, Listener(), str(world / "llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
