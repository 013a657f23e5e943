"""Adapters made into one, from files to files: what is written, what it says, what is refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.adapters.recipe import Recipe
from rankwise.errors import AdapterFileError, AdapterMismatchError, DataError, RankwiseError, RunFolderError, SpecError
from rankwise.formats.record import describe_whole, write_record
from rankwise.jobs.combine import run_combination
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.inspect import run_inspection
from rankwise.jobs.merge import run_merge
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from rankwise.tasks import TASKS
from tests.grid import relative
from tests.jobs.tasks import write_task
from tests.jobs.world import Listener, read, request, write_adapter, write_model, write_rows

PROMPT = torch.tensor([[5, 17, 99, 300, 42, 8]])
WEIGHTS = (0.7, -0.4)


def combined(world, adapters, out, watch=None, *, data=(), force=False, **settings):
    how = {name: settings.pop(name) for name in ("max_length", "dtype", "device") if name in settings}
    named = [str(one) for one in data]
    asked = {"data": named, "force": force, **({"dtype": "float32", "device": "cpu"} if named else {}), **how}
    return run_combination(str(world / "llama"), adapters, out, watch or Quiet(), Recipe(**settings), **asked)


@pytest.fixture(scope="module")
def two(world):
    """Of different ranks, alphas, scalings and targets."""
    one = write_adapter(world / "one", world / "llama", rank=4, alpha=6, targets=("q_proj", "down_proj"))
    settings = {"rank": 3, "alpha": 5, "scaling": "alpha/sqrt(r)", "targets": ("q_proj", "v_proj")}
    return [one, write_adapter(world / "two", world / "llama", size=0.2, **settings)]


@torch.no_grad()
def logits_with(model, folders, weights):
    """Of base + Σ w·ΔW, added to the weights by hand from the files as they lie there."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    for folder, weight in zip(folders, weights, strict=True):
        config, tensors = read(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        for key in (key for key in tensors if "lora_A" in key):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            A, B = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            plain.get_submodule(path).weight += weight * scale * B @ A
    return plain(input_ids=PROMPT).logits


@torch.no_grad()
def logits_in_peft(model, folder):
    plain = AutoModelForCausalLM.from_pretrained(model)
    return PeftModel.from_pretrained(plain, folder)(input_ids=PROMPT).logits.double()


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_what_lies_there_is_base_and_weighted_sum_in_peft(world, two, tmp_path, method):
    rank = {"rank": 7} if method == "svd" else {}
    found = combined(world, two, tmp_path / "out", method=method, weights=WEIGHTS, **rank)
    want = logits_with(world / "llama", two, WEIGHTS)
    assert relative(logits_in_peft(world / "llama", tmp_path / "out"), want) < 1e-5
    assert relative(logits_with(world / "llama", [], []), want) > 1e-2
    assert found["error"] == 0
    assert {path.rsplit(".", 1)[-1]: rank for path, rank in found["ranks"].items()} == {
        "q_proj": 7,
        "v_proj": 3,
        "down_proj": 4,
    }


def test_it_is_written_whole_says_where_it_comes_from_and_can_be_printed(world, two, tmp_path):
    told = Listener()
    found = combined(world, two, tmp_path / "out", told, method="ties", density=0.5, weights=WEIGHTS, rank=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "rankwise.json")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = read(tmp_path / "out" / "rankwise.json")
    assert record["combination"]["of"] == [
        {"name": name, "weight": weight, "digest": read(folder / "rankwise.json")["digest"]}
        for name, weight, folder in zip(("one", "two"), WEIGHTS, two, strict=True)
    ]
    assert 0 < record["combination"]["error"] == found["error"] < 1
    assert record["parameters"] == found["parameters"]
    assert record["base"]["fingerprint"] == read(two[0] / "rankwise.json")["base"]["fingerprint"]
    asked = (
        f"--model {world / 'llama'} --out {tmp_path / 'out'} --method ties --weights 0.7,-0.4 --rank 2 --density 0.5"
    )
    assert record["command"] == f"rankwise combine {two[0]} {two[1]} {asked}"
    assert told.stages == [f"loading {world / 'llama'}", "combining by ties"]
    assert found["adapters"] == {"one": str(two[0]), "two": str(two[1])}


@pytest.mark.filterwarnings("default::rankwise.errors.RankwiseWarning")
def test_other_verbs_take_it_as_any_adapter(world, two, tmp_path):
    combined(world, two, tmp_path / "both", method="svd")
    assert (
        run_inspection(str(tmp_path / "both"))["sites"].keys()
        == read(tmp_path / "both" / "rankwise.json")["sites"].keys()
    )
    assert run_merge(str(world / "llama"), tmp_path / "both", tmp_path / "merged", Quiet())["layers"] == 6
    on = request(world / "llama", world / "train.jsonl", tmp_path / "on", continue_from=tmp_path / "both", max_steps=1)
    run_training(on, Quiet())
    again = combined(world, [tmp_path / "both", tmp_path / "on"], tmp_path / "again")
    assert set(again["ranks"].values()) == {6, 8}


def test_how_a_run_was_read_stays_known_where_all_agree(world, run, tmp_path):
    other = request(world / "llama", world / "train.jsonl", tmp_path / "other", lr=5e-3, max_steps=1, max_length=64)
    run_training(other, Quiet())
    combined(world, [run["out"], tmp_path / "other"], tmp_path / "out")
    record = read(tmp_path / "out" / "rankwise.json")
    rows = {row["name"]: row["value"] for row in record["settings"]}
    assert rows == {"overlong": "truncate", "train_on": "all", "storage": "dense"}
    assert record["template"] == run["record"]["template"]
    assert record["task"] == "causal-lm"


def test_tokens_of_its_own_and_their_tokenizer_stay(world, two, tmp_path):
    rows = [{"prompt": f"what is {n}?", "completion": f"<tool>say {n}</tool>"} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    new = {"add_tokens": "<tool>,</tool>", "targets": "minimal", "max_steps": 1}
    run_training(request(world / "llama", tmp_path / "train.jsonl", tmp_path / "run", **new), Quiet())
    found = combined(world, [two[0], tmp_path / "run"], tmp_path / "out", weights=(1, 0.5))
    assert set(found["taken"]) == set(read(tmp_path / "run" / "rankwise.json")["tokens"])
    assert {tuple(names) for names in found["taken"].values()} == {("run",)}
    record = read(tmp_path / "out" / "rankwise.json")
    assert record["new_tokens"] == read(tmp_path / "run" / "rankwise.json")["new_tokens"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["<tool>", "</tool>"])
    assert ids == list(record["new_tokens"].values())
    for key, tensor in load_file(tmp_path / "run" / "adapter_model.safetensors").items():
        if "token_adapter" in key:
            assert torch.equal(load_file(tmp_path / "out" / "adapter_model.safetensors")[key], tensor)


def test_adapters_of_other_tools_are_taken_on_trust(world, two, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in two]
    for folder in copies:
        (folder / "rankwise.json").unlink()
    found = combined(world, copies, tmp_path / "out")
    assert relative(logits_in_peft(world / "llama", tmp_path / "out"), logits_with(world / "llama", two, (1, 1))) < 1e-5
    assert [one["data"] for one in found["evaluate"]] == [None]
    assert "--data UNSEEN " in found["evaluate"][0]["command"]


@pytest.mark.parametrize("task", ["sequence-classification", "image-classification", "seq2seq", "masked-lm"])
def test_every_task_and_heads_that_were_trained_whole(tmp_path, task):
    files = write_task(tmp_path / "files", task)
    settings = {"batch_tokens": None, "batch_documents": 8, "max_steps": 2, "lr": 1e-2, "rank": 2, "task": task}
    for name, seed in (("a", 0), ("b", 1)):
        run_training(request(**files, out=tmp_path / name, seed=seed, **settings), Quiet())
    a, b, twin = tmp_path / "a", tmp_path / "b", shutil.copytree(tmp_path / "a", tmp_path / "twin")
    how = {"data": [str(files["test"])], "dtype": "float32", "device": "cpu"}
    if TASKS[task].classifies:
        with pytest.raises(SpecError, match="trained whole, otherwise in each of a, b"):
            run_combination(str(files["model"]), [a, b], tmp_path / "out", Quiet(), **how)
        others = [a, twin]
    else:
        others = [a, b]
    found = run_combination(str(files["model"]), others, tmp_path / "out", Quiet(), Recipe(weights=(0.5, 0.5)), **how)
    record = read(tmp_path / "out" / "rankwise.json")
    assert record["task"] == task
    assert [one["name"] for one in found["evaluations"][0]["adapters"]] == [*(one.name for one in others), "out"]
    assert record.get("classes") == read(a / "rankwise.json").get("classes")
    if TASKS[task].classifies:  # half of itself twice
        assert {tuple(names) for names in found["taken"].values()} == {("a", "twin")}
        first, _, last = found["evaluations"][0]["adapters"]
        assert last["loss"] == pytest.approx(first["loss"], rel=1e-5)


# ── measured ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_file_is_measured_by_itself_as_evaluate_does_it(world, two, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", range(400, 406))
    found = combined(world, two, tmp_path / "out", data=[world / "test.jsonl", other], method="svd")
    assert [one["data"] for one in found["evaluations"]] == [str(world / "test.jsonl"), str(other)]
    for one, file in zip(found["evaluations"], (world / "test.jsonl", other), strict=True):
        want = run_evaluation(
            str(world / "llama"), [*two, tmp_path / "out"], [str(file)], Quiet(), dtype="float32", device="cpu"
        )
        assert {name: value for name, value in one.items() if name != "data"} == want
    assert [one["name"] for one in want["adapters"]] == ["one", "two", "out"]
    assert {one["data"] for one in found["evaluate"]} == {str(world / "test.jsonl"), str(other)}


def test_the_commands_name_the_files_that_each_was_judged_by(world, run, two, tmp_path):
    for name in ("judged", "again"):
        record = read(shutil.copytree(run["out"], tmp_path / name) / "rankwise.json")
        rows = [row for row in record["settings"] if row["name"] != "valid"]
        rows.append({"name": "valid", "value": str(world / "valid.jsonl"), "reason": "asked for"})
        (tmp_path / name / "rankwise.json").write_text(json.dumps(record | {"settings": rows}))
    folders = [tmp_path / "judged", two[0], tmp_path / "again"]
    found = combined(world, folders, tmp_path / "out", max_length=64, dtype="float32", device="auto")
    assert [(one["of"], one["data"]) for one in found["evaluate"]] == [
        (["judged", "again"], str(world / "valid.jsonl")),
        (["one"], None),
    ]
    adapters = " ".join(f"--adapter {folder}" for folder in [*folders, tmp_path / "out"])
    command = f"rankwise evaluate --model {world / 'llama'} --data {world / 'valid.jsonl'} {adapters}"
    assert found["evaluate"][0]["command"] == f"{command} --max-length 64 --dtype float32"


# ── what is refused leaves nothing behind ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def dora(world):
    return write_adapter(world / "dora", world / "llama", form="dora", targets=("q_proj",))


def refused(world, adapters, out, error, watch=None, **settings):
    with pytest.raises(error) as told:
        combined(world, adapters, out, watch, **settings)
    assert not out.exists()
    assert not list(out.parent.glob(".*.part"))
    return str(told.value)


def test_what_can_be_known_is_told_before_the_base_is_loaded_and_all_of_it(world, two, dora, tmp_path):
    told = Listener()
    (tmp_path / "empty").mkdir()
    broken = shutil.copytree(two[0], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"cut short")
    said = refused(world, [*two, dora, tmp_path / "empty", broken], tmp_path / "out", SpecError, told)
    for piece in (
        f"{tmp_path / 'empty' / 'adapter_config.json'}: no such file",
        f"{broken / 'adapter_model.safetensors'}: not a whole safetensors file",
        "dora is of form dora",
        "rankwise merge",
    ):
        assert piece in said
    assert told.stages == []


def test_a_single_mistake_keeps_its_own_error(world, two, tmp_path):
    (tmp_path / "empty").mkdir()
    said = refused(world, [two[0], tmp_path / "empty"], tmp_path / "out", AdapterFileError)
    assert "an adapter folder holds adapter_config.json" in said


def test_every_adapters_base_is_checked_and_force_goes_past_it(world, two, tmp_path):
    other = write_model(tmp_path / "other", rms_norm_eps=1e-5)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(other)
        plain.get_submodule("model.layers.0.self_attn.q_proj").weight.add_(0.1)
        plain.save_pretrained(other)
    strangers = [write_adapter(tmp_path / name, other, rank=rank) for name, rank in (("x", 2), ("y", 3))]
    said = refused(world, [two[0], *strangers], tmp_path / "out", AdapterMismatchError)
    assert "2 of 3 adapters do not go with" in said
    assert all(f"{folder}: trained on" in said for folder in strangers)
    assert "--force" in said
    said = refused(world, [two[0], strangers[0]], tmp_path / "out", AdapterMismatchError)
    assert said.startswith(f"{strangers[0]}: trained on")
    combined(world, [two[0], *strangers], tmp_path / "out", force=True)
    assert read(tmp_path / "out" / "rankwise.json")["base"] == read(two[0] / "rankwise.json")["base"]


def test_another_template_is_refused(world, two, run, tmp_path):
    changed = shutil.copytree(run["out"], tmp_path / "changed")
    record = read(changed / "rankwise.json")
    (changed / "rankwise.json").write_text(json.dumps(record | {"template": {"digest": "another"}}))
    said = refused(world, [two[0], changed], tmp_path / "out", AdapterMismatchError)
    assert "another chat template or tokenizer" in said


def test_models_whole_folders_twice_and_several_tasks_are_refused(world, two, tmp_path):
    (tmp_path / "full").mkdir()
    write_record(tmp_path / "full", describe_whole(1, "", {"name": "", "fingerprint": "", "vocabulary": 1}, {}))
    assert "all of whose weights were trained" in refused(
        world, [two[0], tmp_path / "full"], tmp_path / "out", SpecError
    )
    assert "named twice" in refused(world, [two[0], two[0]], tmp_path / "out", SpecError)
    judge = shutil.copytree(two[1], tmp_path / "judge")
    record = read(judge / "rankwise.json")
    (judge / "rankwise.json").write_text(json.dumps(record | {"task": "sequence-classification"}))
    assert "adapters of several tasks" in refused(world, [two[0], judge], tmp_path / "out", SpecError)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [({"weights": (1, 2, 3)}, "3 weights for 2 adapters"), ({"method": "linear"}, "linear needs factors of one rank")],
)
def test_nonsense_is_told_before_anything_is_loaded(world, two, tmp_path, recipe, said):
    told = Listener()
    assert said in refused(world, two, tmp_path / "out", SpecError, told, **recipe)
    assert told.stages == []


def test_documents_that_are_not_there_are_told_before_anything_is_written(world, two, tmp_path):
    assert "unsen" in refused(world, two, tmp_path / "out", RankwiseError, data=[world / "unsen.jsonl"])


def test_what_is_there_is_never_overwritten(world, two, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="nothing was overwritten"):
        combined(world, two, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_documents_that_cannot_be_measured_on_leave_the_adapter_and_say_so(world, two, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    told = Listener()
    with pytest.raises(DataError):
        combined(world, two, tmp_path / "out", told, data=[tmp_path / "bad.jsonl"])
    assert told.texts == [f"{tmp_path / 'out'}: written; now it is measured"]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
