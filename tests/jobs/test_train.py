import os
import re
import signal

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.data.prepare import prepare
from rankwise.data.split import overlap
from rankwise.data.template import Template
from rankwise.engine.folder import held_folder
from rankwise.engine.interrupt import Interrupted
from rankwise.errors import AdapterMismatchError, DataError, RunFolderError, SpecError, TargetError
from rankwise.frozen.load import load_base
from rankwise.jobs.documents import read_documents
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.inspect import run_inspection
from rankwise.jobs.reader import TextReader
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from rankwise.surgery.bank import Bank
from tests.grid import relative
from tests.jobs.world import Listener, lines, read, request, write_model, write_rows

FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "rankwise.json",
    "metrics.jsonl",
    "evaluation.json",
    "samples.json",
    "README.md",
    "report.html",
    "checkpoints",
}
PROMPT = torch.tensor([[5, 17, 99, 300, 42, 8]])


@torch.no_grad()
def logits_here(model, adapter):
    with Bank(load_base(model, dtype="float32").model) as bank:
        bank.load("a", adapter)
        with bank.use("a"):
            return bank.model(input_ids=PROMPT).logits


@torch.no_grad()
def logits_in_peft(model, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)(input_ids=PROMPT).logits


# ── a run and what it leaves ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_leaves_everything_and_nothing_half_done(run):
    assert {path.name for path in run["out"].iterdir()} == FILES | {"tracking", ".lock"}
    assert not list(run["out"].rglob("*.part"))


def test_the_adapter_is_peft_s_too_and_says_the_same(world, run):
    ours, theirs = logits_here(world / "llama", run["out"]), logits_in_peft(world / "llama", run["out"])
    assert relative(ours, theirs) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(world / "llama")(input_ids=PROMPT).logits
    assert relative(ours, base) > 1e-2  # else the comparison above would prove nothing


def test_every_step_is_in_the_metrics_in_order(run):
    found = lines(run["out"] / "metrics.jsonl")
    steps = [line for line in found if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["step"] for line in found if line["kind"] == "evaluation"] == [0, 1, 2, 3, 4]
    told = [event for event in run["told"].events if event["kind"] in ("step", "evaluation")]
    assert told == found
    training = run["record"]["training"]
    assert training["steps"] == 4
    assert training["tokens"] == sum(line["tokens"] for line in steps)
    assert training["seconds"] >= sum(line["seconds"] for line in steps)
    assert training["stopped"] == "finished"


def test_the_record_says_what_was_done_with_what_and_why(world, run):
    record = run["record"]
    rows = {row["name"]: row for row in record["settings"]}
    assert rows["lr"] == {"name": "lr", "value": 0.01, "reason": "asked for"}
    assert rows["rank"] == {"name": "rank", "value": 16, "reason": "the guides' default for one task"}
    assert all(row["reason"] for row in rows.values())
    (file,) = record["data"]["train"]["files"]
    assert file["path"] == str(world / "train.jsonl")
    assert len(file["sha256"]) == 64
    assert record["data"]["train"]["documents"] == 38
    assert record["data"]["valid"]["documents"] == 2
    assert record["command"].startswith("rankwise train --model")
    assert record["template"]["digest"] == Template(AutoTokenizer.from_pretrained(world / "llama")).digest
    assert {"python", "torch", "transformers", "rankwise"} <= record["versions"].keys()
    assert all(site["scale"] == 2.0 for site in record["sites"].values())


def test_the_summary_the_evaluation_and_the_pages_agree(run):
    summary, written = run["summary"], read(run["out"] / "evaluation.json")
    assert summary["evaluation"] == {name: written[name] for name in ("documents", "tokens", "base", "adapters")}
    assert summary["training"] == run["record"]["training"]
    assert summary["samples"] == read(run["out"] / "samples.json")
    assert summary["spec"] == run["record"]["spec"]
    card, page = ((run["out"] / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    assert f"**{summary['verdict']}**" in card
    assert summary["verdict"] in " ".join(re.sub("<[^>]*>", "", page).split())


def test_samples_answer_unseen_questions_side_by_side(run):
    samples = run["summary"]["samples"]
    assert len(samples) == 2
    for sample in samples:
        assert sample.keys() == {"prompt", "reference", "before", "after"}
        number = int(sample["reference"].removeprefix("that is "))
        assert f"what is {number // 2} and" in sample["prompt"]


def test_before_the_first_step_it_is_said_what_will_be_trained(run):
    (plan,) = run["told"].texts
    for piece in (
        "2 × q_proj: rank 16, effective scale 2",
        "38 documents",
        "the guides' default",
        "[black on green]that",
    ):
        assert piece in plan
    assert run["told"].stages[:2] == [f"loading {run['record']['base']['name']}", "reading the documents"]


def test_tensorboard_gets_every_step(run):
    events = b"".join(path.read_bytes() for path in (run["out"] / "tracking").rglob("events.out.tfevents.*"))
    assert events.count(b"train/loss") == 4
    assert events.count(b"valid/loss") == 5


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def documents(world, data, **settings):
    asked = request(world / "llama", data, world / "nowhere", **settings)
    template = Template(AutoTokenizer.from_pretrained(world / "llama"))
    return read_documents(asked, TextReader(template, asked.max_length, asked.overlong), Quiet())


def test_without_a_validation_file_some_documents_are_held_back_and_copies_stay_together(world, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [n // 3 for n in range(600)])  # every row three times
    found = documents(world, rows)
    assert len(found.train) + len(found.valid) == 600
    assert 24 <= len(found.valid) <= 36
    assert overlap(found.train, found.valid) == 0
    assert found.test is found.valid
    again, other = documents(world, rows), documents(world, rows, seed=1)
    assert again.valid.digest == found.valid.digest != other.valid.digest


def test_validation_and_test_files_are_used_as_they_are(world):
    files = {"valid": str(world / "valid.jsonl"), "test": str(world / "test.jsonl")}
    found = documents(world, world / "train.jsonl", **files)
    assert (len(found.train), len(found.valid), len(found.test)) == (40, 6, 12)
    assert found.facts.keys() == {"train", "valid", "test"}


@pytest.mark.parametrize("name", ["valid", "test"])
def test_documents_that_are_also_trained_on_prove_nothing_and_are_refused(world, tmp_path, name):
    shared = write_rows(tmp_path / "shared.jsonl", [*range(500, 510), 100])
    title = {"valid": "validation", "test": "test"}[name]
    with pytest.raises(DataError, match=f"1 of 11 {title} documents are also trained on"):
        documents(world, world / "train.jsonl", **{name: str(shared)})


def test_a_missing_file_is_found_out_before_a_model_is_loaded(world, tmp_path):
    told = Listener()
    for name in ("data", "valid", "test"):
        files = {"data": world / "train.jsonl", name: tmp_path / "trian.jsonl"}
        with pytest.raises(DataError, match=r"trian.jsonl: no such file"):
            run_training(request(world / "llama", out=tmp_path / name, **files), told)
    assert told.stages == []


def test_what_became_of_the_rows_is_counted_and_told(world, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", range(30))
    with rows.open("a") as file:
        file.write('{"prompt": "' + 30 * "long " + '?", "completion": "yes"}\n')
    told, settings = Listener(), {"max_length": 64, "max_steps": 1, "overlong": "drop", "test": world / "test.jsonl"}
    run_training(request(world / "llama", rows, tmp_path / "out", **settings), told)
    assert "1 dropped: longer than max_length" in told.texts[0]
    assert read(tmp_path / "out" / "rankwise.json")["data"]["train"]["dropped"] == {"longer than max_length": 1}


# ── other models, other settings ─────────────────────────────────────────────────────────────────────────────────────


def test_gpt2_is_trained_and_judged_on_a_file_of_its_own(world, tmp_path):
    settings = {"valid": world / "valid.jsonl", "test": world / "test.jsonl", "modules_to_save": "ln_f", "lr": 1e-2}
    patterns = {"rank_pattern": "c_attn=2", "alpha_pattern": "c_attn=3"}
    asked = request(world / "gpt2", world / "train.jsonl", tmp_path / "out", rank=4, **settings, **patterns)
    summary = run_training(asked, Quiet())
    assert summary["evaluation"]["documents"] == 12
    assert relative(logits_here(world / "gpt2", asked.out), logits_in_peft(world / "gpt2", asked.out)) < 1e-5
    found = run_inspection(str(asked.out))
    assert found["modules"] == ["transformer.ln_f"]
    sites = {path.rsplit(".", 1)[-1]: (site["rank"], site["scale"]) for path, site in found["sites"].items()}
    assert sites == {"c_attn": (2, 1.5), "c_proj": (4, 2.0), "c_fc": (4, 2.0)}


def test_training_further_begins_at_the_adapter_s_own_loss(world, adapter, tmp_path):
    valid = world / "valid.jsonl"
    asked = request(world / "llama", world / "train.jsonl", tmp_path / "out", valid=valid, continue_from=adapter)
    told = Listener()
    run_training(asked, told)
    before = run_evaluation(str(world / "llama"), [adapter], [str(valid)], Quiet(), dtype="float32", device="cpu")
    first = next(event for event in told.events if event["kind"] == "evaluation")
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(before["adapters"][0]["loss"], rel=1e-6)
    assert first["loss"] != pytest.approx(before["base"]["loss"], rel=1e-3)
    assert read(tmp_path / "out" / "rankwise.json")["spec"]["rank"] == 4
    assert "as in the adapter that is trained further" in told.texts[0]


def test_an_adapter_of_another_base_is_not_trained_further_unless_forced(world, adapter, tmp_path):
    model = write_model(tmp_path / "other", tie_word_embeddings=True)
    further = {"continue_from": adapter, "max_steps": 1}
    with pytest.raises(AdapterMismatchError, match="--force"):
        run_training(request(model, world / "train.jsonl", tmp_path / "out", **further), Quiet())
    run_training(request(model, world / "train.jsonl", tmp_path / "out", **further, force=True), Quiet())


def test_a_second_ctrl_c_does_not_wait_and_says_how_to_go_on(world, tmp_path):
    def twice(event):
        if event["kind"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    watch = Listener()
    watch.event = twice
    with pytest.raises(Interrupted) as caught:
        run_training(request(world / "llama", world / "train.jsonl", tmp_path / "out", save_every=1), watch)
    assert caught.value.number == signal.SIGINT
    assert caught.value.way_on.startswith("; everything up to the last checkpoint is saved")


def test_a_test_file_of_one_document_gives_no_interval_and_no_verdict(world, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [900])
    asked = request(world / "llama", world / "train.jsonl", tmp_path / "out", test=one, max_steps=1)
    summary = run_training(asked, Quiet())
    assert summary["evaluation"] is None
    assert summary["verdict"].startswith("Not compared with the base")
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_the_same_request_gives_the_same_bits(world, run, tmp_path):
    asked = request(world / "llama", world / "train.jsonl", tmp_path / "out", lr=1e-2)
    run_training(asked, Quiet())
    assert read(asked.out / "rankwise.json")["digest"] == run["record"]["digest"]


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_is_not_empty_is_left_alone(world, run, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(RunFolderError, match="not empty; nothing was overwritten"):
        run_training(request(world / "llama", world / "train.jsonl", tmp_path), Quiet())
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(RunFolderError, match="holds a run already"):
        run_training(request(world / "llama", world / "train.jsonl", run["out"]), Quiet())
    with pytest.raises(RunFolderError, match="cannot write here"):
        run_training(request(world / "llama", world / "train.jsonl", tmp_path / "README.md"), Quiet())


def test_a_folder_in_use_and_one_without_a_run_are_refused_before_anything_is_loaded(world, tmp_path):
    told = Listener()
    with held_folder(tmp_path / "busy", resume=False), pytest.raises(RunFolderError, match="another run is writing"):
        run_training(request(world / "llama", world / "train.jsonl", tmp_path / "busy"), told)
    with pytest.raises(RunFolderError, match="no run to resume"):
        run_training(request(world / "llama", world / "train.jsonl", tmp_path / "new", resume=True), told)
    assert told.stages == []


def test_a_complete_run_is_not_resumed(world, run):
    asked = request(world / "llama", world / "train.jsonl", run["out"], lr=1e-2, track="tensorboard", resume=True)
    before = {path: path.read_bytes() for path in run["out"].glob("*.*") if path.is_file()}
    with pytest.raises(RunFolderError, match="the run is finished"):
        run_training(asked, Quiet())
    assert {path: path.read_bytes() for path in before} == before


def test_a_tracker_that_nobody_knows_is_refused_with_those_that_are(world, tmp_path):
    with pytest.raises(SpecError, match="no tracker 'tensorbord'") as caught:
        run_training(request(world / "llama", world / "train.jsonl", tmp_path / "out", track="tensorbord"), Quiet())
    assert "tensorboard" in caught.value.hint


def test_targets_that_are_not_there_are_refused_with_those_that_are(world, tmp_path):
    with pytest.raises(TargetError, match="'q_porj' matches no layer; did you mean 'q_proj'") as caught:
        run_training(request(world / "llama", world / "train.jsonl", tmp_path / "out", targets="q_porj"), Quiet())
    assert "all-linear" in caught.value.hint


def test_one_document_cannot_be_split(world, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [1, 1, 1])
    with pytest.raises(DataError, match="cannot be split: all are the same"):
        run_training(request(world / "llama", rows, tmp_path / "out"), Quiet())


def test_losses_are_those_of_plain_transformers(world, run):
    """The base's loss of the comparison, computed again document by document without anything of the engine."""
    template = Template(AutoTokenizer.from_pretrained(world / "llama"))
    corpus = prepare(str(world / "train.jsonl"), template, 2048).corpus
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    held = [sample["reference"] for sample in run["summary"]["samples"]]
    nats = tokens = 0.0
    for i in range(len(corpus)):
        ids, mask = corpus.document(i)
        if not any(f"{reference}<|im_end|>" in template.marked(ids, mask)[-1][0] for reference in held):
            continue
        row, chosen = torch.tensor(ids.astype(np.int64)), torch.tensor(np.array(mask))
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none")[chosen[1:]].sum())
        tokens += int(chosen.sum())
    found = run["summary"]["evaluation"]
    assert tokens == found["tokens"]
    assert nats / tokens == pytest.approx(found["base"]["loss"], rel=1e-5)
