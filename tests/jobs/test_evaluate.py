import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.adapters.adapter import checked_name
from rankwise.errors import AdapterFileError, AdapterMismatchError, DataError, RankwiseWarning, SpecError
from rankwise.jobs.evaluate import folder_names, run_evaluation
from rankwise.jobs.watch import Quiet
from tests.jobs.world import read, write_adapter, write_model, write_rows


def evaluated(world, adapters, data="test.jsonl", model="llama", **settings):
    settings = {"dtype": "float32", "device": "cpu", **settings}
    return run_evaluation(str(world / model), adapters, [str(world / data)], Quiet(), **settings)


@pytest.fixture(scope="module")
def fresh(world):
    """An adapter as it is before its first step."""
    return write_adapter(world / "fresh", world / "llama", size=0)


@pytest.fixture(scope="module")
def found(world, adapter, run):
    return evaluated(world, [adapter, run["out"]])


def test_the_result_has_exactly_the_promised_shape(found):
    assert list(found) == ["task", "documents", "tokens", "base", "adapters", "truncated", "dropped", "unused"]
    assert list(found["base"]) == ["loss"]
    for one in found["adapters"]:
        assert list(one) == ["name", "loss", "delta"]
        assert list(one["delta"]) == ["mean", "low", "high"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_adapters_are_compared_side_by_side_on_the_same_documents(world, run, found):
    assert found["documents"] == 12
    assert [one["name"] for one in found["adapters"]] == ["adapter", "run"]
    for one in found["adapters"]:
        delta = one["delta"]
        assert delta["low"] <= delta["mean"] <= delta["high"]
        assert delta["mean"] == pytest.approx(one["loss"] - found["base"]["loss"], abs=1e-9)
    noise, trained = found["adapters"]
    assert trained["delta"]["high"] < 0
    assert abs(noise["loss"] - trained["loss"]) > 0.1
    alone = evaluated(world, [run["out"]])
    assert alone["base"]["loss"] == pytest.approx(found["base"]["loss"], rel=1e-6)
    assert alone["adapters"][0]["loss"] == pytest.approx(trained["loss"], rel=1e-6)


def test_the_same_question_gives_the_same_answer(world, adapter, run, found):
    assert evaluated(world, [adapter, run["out"]]) == found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_differs_by_exactly_nothing_and_is_said_to(world, fresh, dtype):
    with pytest.warns(RankwiseWarning, match="changes nothing"):
        found = evaluated(world, [fresh], dtype=dtype)
    (one,) = found["adapters"]
    assert one["delta"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert one["loss"] == found["base"]["loss"]


def settings_of(source, folder, **values):
    """A copy of a run's adapter that was trained with these settings."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints", "tracking"))
    record = read(folder / "rankwise.json")
    for row in record["settings"]:
        row["value"] = values.get(row["name"], row["value"])
    (folder / "rankwise.json").write_text(json.dumps(record))
    return folder


def test_documents_are_read_as_in_training_where_the_adapters_agree(world, run, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", range(800, 806))
    with data.open("a") as file:
        file.write(json.dumps({"prompt": 30 * "long ", "completion": "yes", "colour": "red"}) + "\n")
    short = settings_of(run["out"], tmp_path / "short", max_length=64, overlong="drop")
    found = evaluated(world, [short], data=data)
    assert (found["documents"], found["dropped"], found["unused"]) == (6, {"longer than max_length": 1}, {"colour": 1})
    assert evaluated(world, [short], data=data, max_length=2048)["documents"] == 7
    assert evaluated(world, [short, run["out"]], data=data)["documents"] == 7
    with pytest.raises(SpecError, match="overlong = 'keep'"):
        evaluated(world, [short], data=data, overlong="keep")


def test_losses_that_are_not_finite_are_told_by_document(world, tmp_path):
    huge = write_adapter(tmp_path / "huge", world / "llama", size=1e30)
    with pytest.raises(DataError, match=r"not a finite number(.|\n)*test.jsonl:\d+: huge"):
        evaluated(world, [huge])


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def names(tmp_path, *folders):
    return folder_names([tmp_path / folder for folder in folders])


def test_an_adapter_is_called_as_its_folder_or_as_much_of_its_path_as_it_takes(tmp_path):
    assert names(tmp_path, "a/run", "b/tune") == ["run", "tune"]
    assert names(tmp_path, "a/run", "b/run") == ["a-run", "b-run"]
    assert names(tmp_path, "x/a/run", "y/a/run", "z/b/other") == ["x-a-run", "y-a-run", "z-b-other"]


def test_names_that_clash_only_after_cleaning_are_told_apart(tmp_path):
    assert len(set(names(tmp_path, "my run", "my-run"))) == 2
    assert len(set(names(tmp_path, "一/二", "三/四"))) == 2
    assert len(set(names(tmp_path, "a" + 70 * "x", "b" + 70 * "x"))) == 2


def test_a_folder_named_twice_is_refused_whatever_its_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match="the same adapter folder is named twice"):
        folder_names([tmp_path / "run", tmp_path / "other" / ".." / "run"])


@given(st.lists(st.text(min_size=1, max_size=80).filter(lambda name: name.isprintable()), min_size=1, unique=True))
def test_every_folder_gets_a_name_that_can_be_one_and_its_own(folders):
    folders = {Path("/runs", folder.replace("/", "")).resolve() for folder in folders}
    found = folder_names(sorted(folders))
    assert len(set(found)) == len(folders)
    assert [checked_name(name) for name in found] == found


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_base_is_refused_unless_forced(world, adapter):
    with pytest.raises(AdapterMismatchError, match="fingerprint") as caught:
        evaluated(world, [adapter], model="tied")
    assert "--force" in caught.value.hint
    assert evaluated(world, [adapter], model="tied", force=True)["adapters"][0]["name"] == "adapter"


def test_an_adapter_that_fits_nowhere_is_refused_even_so(world, adapter):
    with pytest.raises(AdapterMismatchError, match="bind to nothing"):
        evaluated(world, [adapter], model="gpt2", force=True)


def test_another_chat_template_is_refused_unless_forced(world, run, tmp_path):
    other = write_model(tmp_path / "other", template="generation tags")
    rows = [str(world / "test.jsonl")]
    with pytest.raises(AdapterMismatchError, match="another chat template"):
        run_evaluation(str(other), [run["out"]], rows, Quiet())
    assert run_evaluation(str(other), [run["out"]], rows, Quiet(), force=True)["documents"] == 12


def test_what_is_missing_or_broken_is_named(world, adapter, tmp_path):
    with pytest.raises(AdapterFileError, match=r"nowhere/adapter_config.json: no such file"):
        evaluated(world, [tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"text.jsonl: no such file; did you mean 'test.jsonl'"):
        evaluated(world, [adapter], data="text.jsonl")
    broken = shutil.copytree(adapter, tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterFileError, match="not a whole safetensors file"):
        evaluated(world, [broken])
    record = read(adapter / "rankwise.json")
    (broken / "rankwise.json").write_text(json.dumps(record | {"schema": 99}))
    weights.write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterFileError, match="schema 99"):
        evaluated(world, [broken])


def test_documents_that_say_nothing_are_refused(world, adapter, tmp_path):
    with pytest.raises(DataError, match="12 × no trained token within max_length"):
        evaluated(world, [adapter], max_length=8)
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"messages": [{"role": "user", "content": "hello?"}]}\n')
    with pytest.raises(DataError, match="1 × no assistant turn to train"):
        evaluated(world, [adapter], data=silent)
    with pytest.raises(DataError, match="at least two documents, there are 1"):
        evaluated(world, [adapter], data=write_rows(tmp_path / "one.jsonl", [1]))
