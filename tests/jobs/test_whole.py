"""All weights trained, from files to a checkpoint that anyone can load and that stands beside adapters."""

import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.engine.interrupt import Interrupted
from rankwise.errors import AdapterMismatchError, RunFolderError, SpecError
from rankwise.frozen.load import load_base
from rankwise.jobs.chat import Chat
from rankwise.jobs.documents import read_documents
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.inspect import run_inspection
from rankwise.jobs.merge import run_merge
from rankwise.jobs.plan import measured
from rankwise.jobs.reader import reader_for
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from rankwise.surgery.bank import Bank
from tests.jobs.tasks import write_task
from tests.jobs.world import Listener, lines, read, request, write_adapter, write_model

PROMPT = torch.tensor([[5, 17, 99, 300, 42, 8]])
LR = 3e-3


@pytest.fixture(scope="module")
def whole(world):
    """A run of all weights of llama; its folder, what it returned and what it told."""
    told = Listener()
    asked = request(world / "llama", world / "train.jsonl", world / "all-weights", form="full", lr=LR)
    return {"out": asked.out, "summary": run_training(asked, told), "told": told}


# ── a run and what it leaves ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_leaves_an_ordinary_checkpoint_with_its_evidence(world, whole):
    names = {path.name for path in whole["out"].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "rankwise.json", "report.html"} <= names
    assert {"README.md", "evaluation.json", "samples.json", "metrics.jsonl", "checkpoints"} <= names
    assert not any(name.startswith("adapter") for name in names)
    record, summary = read(whole["out"] / "rankwise.json"), whole["summary"]
    assert summary["spec"] == record["spec"] == {"form": "full"}
    theirs = AutoModelForCausalLM.from_pretrained(whole["out"])
    assert record["parameters"] == sum(weight.numel() for weight in theirs.parameters())
    assert record["digest"] == Bank(theirs).base_fingerprint
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    assert record["base"]["fingerprint"] == Bank(base).base_fingerprint != record["digest"]
    assert all(not torch.equal(weight, base.get_parameter(name)) for name, weight in theirs.named_parameters())
    assert AutoTokenizer.from_pretrained(whole["out"]).chat_template
    assert summary["evaluation"]["adapters"][0]["name"] == "full"
    card, page = ((whole["out"] / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    assert "library_name: transformers" in card
    assert "PeftModel" not in card
    assert "All weights" in page
    assert {event["adapter"] for event in whole["told"].events if event["kind"] == "step"} == {"full"}
    assert [sample.keys() for sample in summary["samples"]] == [{"prompt", "reference", "before", "after"}] * 2


def test_what_was_judged_after_training_is_what_was_saved(world, whole):
    """The losses of the run itself, and those of the checkpoint loaded anew by transformers alone."""
    found = read(whole["out"] / "evaluation.json")
    documents = sorted(found["per_document"]["adapters"]["full"])
    asked = request(world / "llama", world / "train.jsonl", world / "unused", form="full")
    base = load_base(world / "llama", dtype="float32")
    reader = reader_for(base, None, max_length=2048, overlong="truncate", train_on="all")
    corpus = read_documents(asked, reader, Quiet()).test
    for folder, row in ((whole["out"], documents), (world / "llama", sorted(found["per_document"]["base"]))):
        model, losses = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
        for i in range(len(corpus)):
            tokens, mask = (torch.as_tensor(array) for array in corpus.document(i))
            with torch.no_grad():
                logits = model(input_ids=tokens[None].long()).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, tokens[1:].long(), reduction="none")
            losses.append(float((each * mask[1:]).sum()))
        assert sorted(losses) == pytest.approx(row, rel=1e-4)


def test_the_plan_and_the_settings_speak_of_weights(whole):
    plan = next(text for text in whole["told"].texts if "settings" in text)
    assert "all weights, no adapter" in plan
    assert "masters, gradients and optimiser" in plan
    rows = {row["name"]: row for row in read(whole["out"] / "rankwise.json")["settings"]}
    assert rows["form"]["value"] == "full"
    assert not {"rank", "alpha", "targets", "init", "dropout", "lr_ratio", "continue_from"} & rows.keys()


def test_stopped_and_resumed_it_is_the_same_checkpoint(world, tmp_path):
    model = write_model(tmp_path / "model", dtype=torch.bfloat16)
    settings = {"form": "full", "lr": LR, "dtype": "bfloat16", "evaluate_every": 1}

    class Stopping(Listener):
        def event(self, event):
            super().event(event)
            if event["kind"] == "step" and event["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    def asked(name, **more):
        return request(model, world / "train.jsonl", tmp_path / name, **settings, **more)

    run_training(asked("once"), Quiet())
    with pytest.raises(Interrupted) as stopped:
        run_training(asked("cut"), Stopping())
    assert "--form full" in stopped.value.way_on
    run_training(asked("cut", resume=True), Quiet())
    one, other = (tmp_path / name / "model.safetensors" for name in ("once", "cut"))
    assert one.read_bytes() == other.read_bytes()
    assert torch.bfloat16 == AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype="auto").dtype
    told = [[line | {"seconds": 0} for line in lines(tmp_path / name / "metrics.jsonl")] for name in ("once", "cut")]
    assert told[0] == told[1]
    with pytest.raises(RunFolderError, match="the run is finished"):
        run_training(asked("cut", resume=True), Quiet())


# ── beside adapters ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_beside_an_adapter_it_has_the_losses_that_it_has_as_a_model(world, whole, adapter, tmp_path):
    data, fine = [str(world / "test.jsonl")], {"dtype": "float32", "device": "cpu"}
    found = run_evaluation(str(world / "llama"), [adapter, whole["out"]], data, Quiet(), **fine)
    alone = run_evaluation(str(world / "llama"), [adapter], data, Quiet(), **fine)
    still = write_adapter(tmp_path / "still", whole["out"], size=0.1)
    itself = run_evaluation(str(whole["out"]), [still], data, Quiet(), **fine)
    other = run_evaluation(str(world / "llama"), [whole["out"], adapter], data, Quiet(), **fine)
    first, second = found["adapters"]
    assert (first["name"], second["name"]) == ("adapter", "all-weights")
    assert first == alone["adapters"][0]
    assert found["base"] == alone["base"]
    assert second["loss"] == itself["base"]["loss"]
    assert second["delta"]["mean"] == pytest.approx(second["loss"] - found["base"]["loss"], rel=1e-6)
    assert other["adapters"] == [second, first]
    alone = run_evaluation(str(world / "llama"), [whole["out"]], data, Quiet(), **fine)
    assert alone["adapters"] == [second]


def test_a_checkpoint_of_another_base_is_refused_unless_forced(world, whole):
    data = [str(world / "test.jsonl")]
    with pytest.raises(AdapterMismatchError, match="fingerprint"):
        run_evaluation(str(world / "tied"), [whole["out"]], data, Quiet(), dtype="float32")
    found = run_evaluation(str(world / "tied"), [whole["out"]], data, Quiet(), dtype="float32", force=True)
    assert len(found["adapters"]) == 1


def test_beside_an_adapter_with_tokens_of_its_own_it_is_refused(world, whole, tmp_path):
    asked = request(world / "llama", world / "train.jsonl", tmp_path / "new", add_tokens="<new>", max_steps=1)
    with pytest.warns(match="no training document"):
        run_training(asked, Quiet())
    with pytest.raises(SpecError, match="tokens of its own"):
        run_evaluation(str(world / "llama"), [asked.out, whole["out"]], [str(world / "test.jsonl")], Quiet())


def test_verbs_for_adapters_say_what_it_is(world, whole, tmp_path):
    with pytest.raises(SpecError, match="and no adapter"):
        run_merge(str(world / "llama"), whole["out"], tmp_path / "merged", Quiet())
    with pytest.raises(SpecError, match=r"talk to it as --model"):
        Chat(str(world / "llama"), {"a": whole["out"]}, Quiet())
    with pytest.raises(SpecError, match="train it further as --model"):
        run_training(
            request(world / "llama", world / "train.jsonl", tmp_path / "x", continue_from=whole["out"]), Quiet()
        )
    assert Chat(str(whole["out"]), {}, Quiet(), max_new_tokens=2).reply("hello") is not None
    found = run_inspection(str(whole["out"]))
    assert found["kind"] == "model"
    assert found["trained"]["base"]["name"] == str(world / "llama")
    assert found["trained"]["training"]["steps"] == 4


def test_it_is_trained_further_as_a_model(world, whole, tmp_path):
    asked = request(whole["out"], world / "train.jsonl", tmp_path / "further", form="full", max_steps=1)
    assert asked.lr == 2e-5
    run_training(asked, Quiet())
    assert read(asked.out / "rankwise.json")["base"]["fingerprint"] == read(whole["out"] / "rankwise.json")["digest"]


# ── other tasks ──────────────────────────────────────────────────────────────────────────────────────────────────────

TASKS = ("masked-lm", "seq2seq", "sequence-classification", "image-classification")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_whole_and_stands_beside_an_adapter(task, tmp_path):
    files = write_task(tmp_path, task)
    for form in ("lora", "full"):
        own = {"task": task, "form": form, "batch_tokens": None, "max_steps": 2}
        own |= {part: str(files[part]) for part in ("valid", "test")}
        run_training(request(files["model"], files["data"], tmp_path / form, **own), Quiet())
    outs = [tmp_path / form for form in ("lora", "full")]
    data = [str(files["test"])]
    found = run_evaluation(str(files["model"]), outs, data, Quiet(), dtype="float32", device="cpu")
    own = read(outs[1] / "evaluation.json")
    assert [one["name"] for one in found["adapters"]] == ["lora", "full"]
    assert found["adapters"][1]["loss"] == pytest.approx(own["adapters"][0]["loss"], rel=1e-5)
    assert found["base"]["loss"] == pytest.approx(own["base"]["loss"], rel=1e-5)
    assert load_base(outs[1], task=task).fresh == ()


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_rate_is_a_tenth_of_an_adapter_s_and_says_so():
    shared = {"model": "m", "data": "d", "out": "o", "form": "full"}
    asked = TrainRequest(**shared)
    row = next(row for row in asked.table() if row["name"] == "lr")
    assert row["value"] == 2e-5
    assert "tenth" in row["reason"]
    assert "--lr" not in asked.command()
    assert "--form full" in asked.command()
    assert TrainRequest(**shared, task="seq2seq").lr == 5e-5
    assert TrainRequest(**shared, lr=1e-3).lr == 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 8},
        {"alpha": 4},
        {"targets": "q_proj"},
        {"dropout": 0.1},
        {"init": "pissa"},
        {"lr_ratio": 4},
        {"modules_to_save": "lm_head"},
        {"add_tokens": "<a>"},
        {"continue_from": "a"},
        {"storage": "nf4"},
        {"storage": "int8"},
        {"target_rank": 4},
        {"scenario": "quick"},
    ],
    ids=str,
)
def test_settings_of_adapters_are_refused_beside_it(settings):
    with pytest.raises(SpecError, match="form full trains") as caught:
        TrainRequest(model="m", data="d", out="o", form="full", **settings)
    assert next(iter(settings)) in str(caught.value)


def test_measured_steps_train_whole_too(tmp_path):
    model = write_model(tmp_path / "model")
    found = measured(model, {"method": "full", "batch_tokens": 64, "document_tokens": 32, "dtype": "float32"})
    assert found["peak"] > found["process"] > 0
    assert found["predicted"] > found["process"]
