import json

import pytest

from rankwise.errors import RunFolderError
from rankwise.jobs import quickstart
from rankwise.jobs.quickstart import ENOUGH, TEST, TRAIN, VALID, run_quickstart
from tests.jobs.world import SHORT, Listener, lines, read


@pytest.mark.slow
def test_it_goes_from_nothing_to_a_comparison_on_modules_it_has_not_seen(world, tmp_path):
    told = Listener()
    short = {**SHORT, "max_steps": 2, "max_length": 640}  # the tiny tokenizer makes many tokens of a function
    found = run_quickstart(tmp_path / "out", told, str(world / "llama"), **short)
    rows = {name: lines(tmp_path / "out" / "data" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert {name: len(some) for name, some in rows.items()} == {"train": TRAIN, "valid": VALID, "test": TEST}
    modules = {name: {row["origin"].split(":")[0] for row in some} for name, some in rows.items()}
    assert not modules["train"] & (modules["valid"] | modules["test"])
    assert found["evaluation"]["documents"] >= ENOUGH
    assert (tmp_path / "out" / "run" / "report.html").exists()
    told_by_search = found["search"]["recommendation"]
    assert (tmp_path / "out" / "search" / "report.html").exists()
    record = read(tmp_path / "out" / "run" / "rankwise.json")
    trained = {row["name"]: row["value"] for row in record["settings"]}
    assert [trained[name] for name in ("rank", "alpha", "lr")] == [
        told_by_search[name] for name in ("rank", "alpha", "lr")
    ], "what was found is what is trained with"
    assert any(told_by_search["sentence"] in text for text in told.texts)
    assert found["data"] == str(tmp_path / "out" / "data")
    assert found["model"] == str(world / "llama")


# ── enough to compare on ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with so many functions, so many of a hundred of them too long; what is told before training."""
    told = Listener()

    def collected(functions, too_long):
        asked = []

        def write(folder, *, train, valid):
            asked.append(valid)
            folder.mkdir(parents=True, exist_ok=True)
            for name, count in (("train", train), ("valid", min(valid, functions))):
                said = [("word " * 400 if n % 100 < too_long else "word", n) for n in range(count)]
                rows = [{"prompt": f"{name} {text} {n}", "completion": "A sentence."} for text, n in said]
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return folder / "train.jsonl", folder / "valid.jsonl"

        def train(request, watch):
            assert watch is told
            return {"texts": list(told.texts), "test": len(lines(tmp_path / "out" / "data" / "test.jsonl"))}

        monkeypatch.setattr(quickstart, "write_docstrings", write)
        monkeypatch.setattr(quickstart, "run_training", train)
        return asked, told

    return collected


@pytest.mark.parametrize(("too_long", "times"), [(0, 1), (25, 1), (45, 2), (75, 4)])
def test_more_is_collected_until_enough_is_short_enough(world, tmp_path, machine, too_long, times):
    asked, told = machine(10_000, too_long)
    found = run_quickstart(tmp_path / "out", told, str(world / "llama"), search=False)
    assert found["texts"] == []
    assert asked[-1] == VALID + times * TEST
    assert found["test"] == times * TEST


@pytest.mark.parametrize(
    ("functions", "too_long", "few"), [(VALID + 150, 0, 150), (10_000, 90, 110), (10_000, 100, 0), (30, 0, 0)]
)
def test_too_few_to_compare_on_are_told_in_a_sentence_before_training(
    world, tmp_path, machine, functions, too_long, few
):
    asked, told = machine(functions, too_long)
    found = run_quickstart(tmp_path / "out", told, str(world / "llama"), search=False)
    (sentence,) = found["texts"]
    assert sentence.startswith(f"only {few} functions to compare on were found here that are short enough")
    assert f"fewer than {ENOUGH}" in sentence
    assert "\n" not in sentence
    assert len(asked) == (1 if functions < 10_000 else 3)


def test_a_folder_that_is_not_empty_is_left_alone(world, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(RunFolderError, match="nothing was overwritten"):
            run_quickstart(out, Listener(), str(world / "llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
