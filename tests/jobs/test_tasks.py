"""Every task from files to files: trained, compared, merged, read by PEFT, refused where it must be."""

import json
import math

import numpy as np
import peft
import pytest
import torch
import transformers as hf

from rankwise.engine.evaluate import evaluate
from rankwise.errors import AdapterMismatchError, DataError, SpecError
from rankwise.frozen.load import load_base
from rankwise.jobs.chat import Chat
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.inspect import run_inspection
from rankwise.jobs.merge import run_merge
from rankwise.jobs.reader import load_for, longest_text, reader_for
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from rankwise.reports.reader import read_run
from rankwise.surgery.bank import Bank
from rankwise.tasks import TASKS
from tests.cli.conftest import rankwise  # noqa: F401 (the command's own entry point)
from tests.grid import relative
from tests.jobs.tasks import BASES, CLASSES, write_base, write_labelled, write_pairs, write_task, write_texts
from tests.jobs.world import Listener, read, request

ALL = pytest.mark.parametrize("task", BASES)
CLASSIFYING = [task for task in BASES if TASKS[task].classifies]
SETTINGS = {"lr": 2e-2, "rank": 4, "batch_documents": 8, "max_steps": 6, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A whole run of each task, made when it is first asked for."""
    made: dict[str, dict] = {}

    def run(task):
        if task not in made:
            files = write_task(tmp_path_factory.mktemp(task), task)
            told = Listener()
            asked = request(**files, out=files["model"].parent / "run", task=task, batch_tokens=None, **SETTINGS)
            summary = run_training(asked, told)
            made[task] = {**files, "out": asked.out, "summary": summary, "told": told}
        return made[task]

    return run


def bank_of(run, task):
    """The base with the run's adapter in it, and the test documents."""
    record = read(run["out"] / "rankwise.json")
    names = tuple(row["name"] for row in record.get("classes", []))
    base = load_base(run["model"], dtype="float32", device="cpu", task=task, classes=names, seed=99)
    bank = Bank(base.model)
    bank.load("adapter", run["out"])
    return base, bank


# ── from files to files ──────────────────────────────────────────────────────────────────────────────────────────────


@ALL
def test_a_run_leaves_everything_behind_and_its_report_can_be_read(runs, task):
    run = runs(task)
    found = read_run(run["out"])
    assert found.record.task == task
    assert found.evaluation.documents == run["summary"]["evaluation"]["documents"]
    assert bool(found.samples) == (task == "seq2seq")
    page, card = (run["out"] / name for name in ("report.html", "README.md"))
    assert f"pipeline_tag: {TASKS[task].pipeline}" in card.read_text()
    assert TASKS[task].loads in card.read_text()
    assert ("accuracy" in page.read_text()) == (task in CLASSIFYING)
    assert ("perplexity" in page.read_text()) == (task not in CLASSIFYING)
    (text,) = run["told"].texts
    assert task in text
    assert all(name in text for name in (CLASSES if task == "sequence-classification" else ()))


@ALL
def test_evaluating_needs_no_more_than_base_adapter_and_data_and_says_what_training_said(runs, task):
    """The base is loaded with another seed: its fresh head is another one, and of no account."""
    run = runs(task)
    found = run_evaluation(str(run["model"]), [run["out"]], [str(run["test"])], Quiet(), dtype="float32", device="cpu")
    want = run["summary"]["evaluation"]
    assert found["task"] == task
    assert found["documents"] == want["documents"]
    assert found["adapters"][0]["loss"] == pytest.approx(want["adapters"][0]["loss"], rel=1e-6)
    assert found["base"]["loss"] == pytest.approx(want["base"]["loss"], rel=1e-6)
    if task in CLASSIFYING:
        assert found["adapters"][0]["accuracy"] == want["adapters"][0]["accuracy"]
        assert found["reference"] == "class frequencies"
        assert found["base"]["loss"] == pytest.approx(math.log(len(found["classes"])), abs=0.1)


@ALL
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_it_on_the_original_base_with_the_same_logits(runs, task):
    run = runs(task)
    base, bank = bank_of(run, task)
    names = {"num_labels": len(base.classes)} if base.classes else {}
    torch.manual_seed(5)
    clean = getattr(hf, TASKS[task].loads).from_pretrained(run["model"], **names)
    if task == "sequence-classification":
        clean.config.pad_token_id = base.model.config.pad_token_id
    theirs = peft.PeftModel.from_pretrained(clean, run["out"]).eval()
    stated = read(run["out"] / "adapter_config.json")["task_type"]
    assert stated == TASKS[task].peft
    for rows in (1, 3):
        inputs = given(task, rows, base)
        with bank.use("adapter"):
            want = base.model(**inputs).logits
        torch.testing.assert_close(theirs(**inputs).logits, want, rtol=1e-5, atol=1e-5)
    assert relative(want, base.model(**inputs).logits) > 1e-3, "the adapter does nothing"


def given(task, rows, base):
    """Some input for a model of a task."""
    generator = torch.Generator().manual_seed(rows)
    if task == "image-classification":
        return {"pixel_values": torch.randn(rows, 1, 16, 16, generator=generator)}
    words = torch.randint(20, 90, (rows, 9), generator=generator)
    begun = {"decoder_input_ids": words[:, :4]} if task == "seq2seq" else {}
    return {"input_ids": words, "attention_mask": torch.ones_like(words), **begun}


@ALL
@pytest.mark.filterwarnings("ignore")
def test_merged_it_is_an_ordinary_model_of_its_task(runs, task, tmp_path):
    run = runs(task)
    found = run_merge(str(run["model"]), run["out"], tmp_path / "merged", Quiet())
    assert found["logits_error"] < found["tolerance"]
    base, bank = bank_of(run, task)
    merged = getattr(hf, TASKS[task].loads).from_pretrained(tmp_path / "merged")
    if base.classes:
        assert list(merged.config.id2label.values()) == list(base.classes)
        again = load_base(tmp_path / "merged", task=task, classes=base.classes, dtype="float32")
        assert again.fresh == (), "the head is there"
    inputs = given(task, 3, base)
    with bank.use("adapter"), torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, base.model(**inputs).logits, rtol=1e-4, atol=1e-5)


@ALL
def test_what_it_is_for_and_what_it_tells_apart_is_shown(runs, task):
    found = run_inspection(str(runs(task)["out"]))
    assert found["task"] == task
    assert found["classes"] == runs(task)["summary"]["evaluation"].get("classes", [])
    assert bool(found["classes"]) == (task in CLASSIFYING)
    model = run_inspection(str(runs(task)["model"]), task)
    assert model["architecture"] == type(load_base(runs(task)["model"], task=task).model).__name__


@ALL
def test_the_command_line_trains_and_evaluates(task, tmp_path, rankwise):  # noqa: F811
    files = write_task(tmp_path, task)
    options = [word for name, path in files.items() for word in (f"--{name}", path)]
    quick = ("--max-steps", 1, "--dtype", "float32", "--rank", 2)
    ran = rankwise("train", "--task", task, *options, "--out", tmp_path / "run", *quick, "--json")
    assert ran.code == 0, ran.err or ran.out
    assert ran.json["task"] == task
    words = ("evaluate", "--model", files["model"], "--adapter", tmp_path / "run", "--data", files["test"])
    told = rankwise(*words, "--dtype", "float32")
    assert told.code == 0, told.err
    assert ("accuracy" in told.out) == (task in CLASSIFYING)
    assert f"nats per {TASKS[task].unit}" in told.err
    assert told.out.splitlines()[0].startswith("class frequencies" if task in CLASSIFYING else "base")
    found = rankwise(*words, "--dtype", "float32", "--json").json
    assert found["adapters"][0]["name"] == "run"


def test_a_model_of_causal_language_learns_classes_through_a_score_head(tmp_path):
    files = write_task(tmp_path, "sequence-classification") | {"model": write_base(tmp_path / "llama", "llama")}
    settings = SETTINGS | {"max_steps": 2}
    asked = request(**files, out=tmp_path / "run", task="sequence-classification", batch_tokens=None, **settings)
    summary = run_training(asked, Quiet())
    assert read(asked.out / "rankwise.json")["modules"] == ["score"]
    found = run_evaluation(str(files["model"]), [asked.out], [str(files["test"])], Quiet(), dtype="float32")
    assert found["adapters"][0]["loss"] == pytest.approx(summary["evaluation"]["adapters"][0]["loss"], rel=1e-6)


def test_an_adapter_of_classes_is_trained_further_on_the_original_base(runs, tmp_path):
    run = runs("sequence-classification")
    rest = {name: run[name] for name in ("model", "data", "valid", "test")}
    settings = {**SETTINGS, "rank": None, "max_steps": 1, "lr": 1e-9, "seed": 4}
    further = {name: value for name, value in settings.items() if value is not None}
    asked = request(
        **rest,
        out=tmp_path / "further",
        task="sequence-classification",
        batch_tokens=None,
        continue_from=run["out"],
        **further,
    )
    summary = run_training(asked, Quiet())
    before = run["summary"]["evaluation"]["adapters"][0]["loss"]
    assert summary["evaluation"]["adapters"][0]["loss"] == pytest.approx(before, rel=1e-4)


def test_a_finetuned_classifier_is_its_own_reference(tmp_path):
    """Where the checkpoint tells the very classes apart, the base is asked, and nothing is trained whole."""
    files = write_task(tmp_path, "sequence-classification")
    config = hf.AutoConfig.from_pretrained(files["model"], id2label=dict(enumerate(("GOOD", "BAD", "NEUTRAL"))))
    tokenizer = hf.AutoTokenizer.from_pretrained(files["model"])
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    settings = SETTINGS | {"max_steps": 1}
    asked = request(
        **{**files, "model": tmp_path / "tuned"},
        out=tmp_path / "run",
        task="sequence-classification",
        batch_tokens=None,
        **settings,
    )
    summary = run_training(asked, Quiet())
    record = read(asked.out / "rankwise.json")
    assert (record["modules"], summary["evaluation"]["reference"]) == ([], "base")
    assert [row["name"] for row in record["classes"]] == ["good", "bad", "neutral"], "in the model's own order"
    base, classes = load_for(str(tmp_path / "tuned"), "sequence-classification", None, dtype="float32", device="cpu")
    reader = reader_for(base, classes, max_length=64, overlong="truncate", train_on="all")
    rows = write_labelled(tmp_path / "rows.jsonl", [3, 4, 5])  # number 0 is bad there, and good here: the name counts
    assert reader.read([str(rows)], "test", lambda rows, share: None).corpus.labels.tolist() == [1, 0, 2]


def test_the_right_classes_are_said_in_the_models_own_order(runs):
    """Accuracy by hand: each document through transformers' own pipeline of tokenizer and model."""
    run = runs("sequence-classification")
    base, bank = bank_of(run, "sequence-classification")
    rows = [json.loads(line) for line in run["test"].read_text().splitlines()]
    right = 0
    for row in rows:
        with bank.use("adapter"), torch.no_grad():
            said = int(base.model(**base.tokenizer(row["text"], return_tensors="pt")).logits.argmax())
        right += base.model.config.id2label[said] == row["label_name"]
    found = run["summary"]["evaluation"]["adapters"][0]["accuracy"]["value"]
    assert found == pytest.approx(right / len(rows))


def test_samples_of_an_encoder_and_decoder_are_what_transformers_writes(runs):
    run = runs("seq2seq")
    base, bank = bank_of(run, "seq2seq")
    (first, *_) = run["summary"]["samples"]
    inputs = base.tokenizer(first["prompt"], return_tensors="pt", return_token_type_ids=False)
    for name, key in ((None, "before"), ("adapter", "after")):
        with bank.use(name), torch.no_grad():
            out = base.model.generate(**inputs, max_new_tokens=2 * 8 + 16, do_sample=False)
        written = base.tokenizer.decode(out[0], skip_special_tokens=True).strip()
        assert written.startswith(first[key]) or first[key].startswith(written)
    assert first["reference"] == " ".join(first["prompt"].split()[1:2] * 2)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def labelled(tmp_path, numbers, label=None):
    path = write_labelled(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", numbers)
    if label is not None:
        rows = [
            json.loads(line) | {"label": label, "label_name": f"name {label}"} for line in path.read_text().splitlines()
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("part", ["valid", "test"])
def test_labels_that_training_does_not_have_are_listed_before_a_model_is_loaded(tmp_path, part):
    files = write_task(tmp_path / "world", "sequence-classification") | {"model": tmp_path / "nowhere"}
    asked = {**files, part: labelled(tmp_path, range(900, 904), label=7)}
    with pytest.raises(DataError, match=r"'name 7': 4 rows, first .*:1"):
        run_training(request(**asked, out=tmp_path / "out", task="sequence-classification", batch_tokens=None), Quiet())


def test_pictures_of_other_classes_are_refused_before_a_model_is_loaded(tmp_path):
    files = write_task(tmp_path / "world", "image-classification") | {"model": tmp_path / "nowhere"}
    x, y = np.zeros((4, 20, 20), np.uint8), np.zeros(4, int)
    np.savez(tmp_path / "other.npz", x_valid=x, y_valid=y, class_names=np.array(["left"]))
    asked = {**files, "valid": tmp_path / "other.npz"}
    with pytest.raises(DataError, match=r"'left' \(4 pictures\)"):
        run_training(request(**asked, out=tmp_path / "out", task="image-classification", batch_tokens=None), Quiet())


def test_an_adapter_of_one_task_is_not_taken_for_another(runs, tmp_path, world):
    run = runs("sequence-classification")
    with pytest.raises(
        AdapterMismatchError, match="trained for sequence-classification, and the base is here for caus"
    ):
        Chat(str(world / "llama"), {"a": run["out"]}, Quiet())
    with pytest.raises(SpecError, match="adapters of several tasks"):
        run_evaluation(str(run["model"]), [run["out"], runs("masked-lm")["out"]], [str(run["test"])], Quiet())


def test_adapters_of_different_classes_are_not_compared(runs, tmp_path):
    run = runs("sequence-classification")
    record = read(run["out"] / "rankwise.json")
    for row in record["classes"]:
        row["name"] = f"other {row['name']}"
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((run["out"] / name).read_bytes())
    (other / "rankwise.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match="adapters of different classes"):
        run_evaluation(str(run["model"]), [run["out"], other], [str(run["test"])], Quiet())


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_pefts_says_its_task_and_the_base_its_classes(runs, tmp_path):
    """Nobody counted its classes, so that the reference gives each the same chance."""
    run = runs("sequence-classification")
    base, _ = bank_of(run, "sequence-classification")
    other = tmp_path / "theirs"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((run["out"] / name).read_bytes())
    base.model.config.save_pretrained(tmp_path / "base")
    for path in run["model"].iterdir():
        if path.name != "config.json":
            (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    found = run_evaluation(str(tmp_path / "base"), [other], [str(run["test"])], Quiet(), dtype="float32")
    assert found["task"] == "sequence-classification"
    assert found["base"]["loss"] == pytest.approx(math.log(3))
    want = run["summary"]["evaluation"]["adapters"][0]["loss"]
    assert found["adapters"][0]["loss"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "longest"), [("bert", 128), ("roberta", 128 - 1), ("t5", 2**31)], ids=["bert", "roberta", "t5"]
)
def test_a_model_that_numbers_its_positions_takes_no_more_than_it_has(tmp_path, family, longest):
    task = "seq2seq" if family == "t5" else "masked-lm"
    model = load_base(write_base(tmp_path / family, family), task=task).model
    if family == "roberta":  # positions are counted from behind the number of the padding
        assert longest_text(model) == 128 - (model.config.pad_token_id + 1)
    else:
        assert longest_text(model) == longest


def test_texts_longer_than_the_model_are_cut_at_its_limit_and_counted(tmp_path):
    files = write_task(tmp_path, "sequence-classification")
    rows = [json.loads(line) for line in files["data"].read_text().splitlines()]
    rows[0]["text"] = "again " * 400
    files["data"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SETTINGS | {"max_steps": 1}
    asked = request(**files, out=tmp_path / "run", task="sequence-classification", batch_tokens=None, **settings)
    run_training(asked, Quiet())
    facts = read(asked.out / "rankwise.json")["data"]["train"]
    assert facts["truncated"] == 1


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_in_python_it_is_the_same(tmp_path):
    """And without frequencies a base is its own reference, though its head is fresh."""
    import rankwise as rw

    files = write_task(tmp_path, "sequence-classification")
    classes = rw.find_classes(files["data"])
    base = rw.load_base(files["model"], task="sequence-classification", classes=classes.names, dtype="float32")
    reading = rw.LabelledTexts(base.tokenizer, classes)
    data = rw.prepare(files["data"], reading, max_length=128, cache=tmp_path / "cache").corpus
    train, valid = rw.split(data, share=0.2)
    with rw.Bank(base.model) as bank:
        bank.add("task", rw.LoraSpec(rank=4, modules_to_save=base.fresh))
        rw.train(bank, {"task": rw.Run(lr=1e-2)}, train, valid=valid, loop=rw.Loop(max_steps=2, batch_documents=8))
        found = rw.evaluate(bank, ["task"], valid, frequencies=classes.counts).summary()
    assert found["classes"] == list(CLASSES)
    with Bank(base.model) as bank:
        bank.add("task", rw.LoraSpec(rank=4))
        assert evaluate(bank, ["task"], valid).summary()["reference"] == "base"


def test_files_of_the_world_share_no_document(tmp_path):
    for write in (write_texts, write_pairs, write_labelled):
        one, other = write(tmp_path / "a", range(100, 148)), write(tmp_path / "b", range(200, 212))
        assert not set(one.read_text().splitlines()) & set(other.read_text().splitlines())
