"""Training more on what was trained before: on top of it, with its optimiser, with old documents mixed in."""

import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from rankwise.engine.interrupt import Interrupted
from rankwise.errors import AdapterMismatchError, DataError, RankwiseWarning, RunFolderError, SpecError
from rankwise.formats.peft import read_adapter
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from tests.jobs.world import Listener, lines, read, request, write_adapter, write_rows

# ── on top ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def upper(world, adapter):
    asked = request(
        world / "llama", world / "train.jsonl", world / "upper", valid=world / "valid.jsonl", onto=adapter,
        rank=2, targets="q_proj,down_proj", lr=1e-2,
    )  # fmt: skip
    told = Listener()
    return {"out": asked.out, "asked": asked, "summary": run_training(asked, told), "told": told}


def test_what_is_saved_is_the_sum_of_both_on_the_bare_base(world, adapter, upper):
    record = read(upper["out"] / "rankwise.json")
    lower, both = read_adapter(adapter), read_adapter(upper["out"])
    assert record["base"]["fingerprint"] == read(adapter / "rankwise.json")["base"]["fingerprint"]
    assert record["onto"]["folder"] == str(adapter)
    assert record["onto"]["digest"] == lower.digest()
    for path, factors in both.sites.items():
        on_top = path.endswith(("q_proj", "down_proj"))
        assert factors.rank == (6 if on_top else 4)
        apart = torch.dist(factors.delta(), lower.sites[path].delta())
        assert (apart > 1e-2) if on_top else (apart < 1e-5)


def test_training_begins_where_the_lower_adapter_is_and_ends_as_what_is_saved(world, adapter, upper):
    files = [str(world / "valid.jsonl")]
    found = run_evaluation(
        str(world / "llama"), [adapter, upper["out"]], files, Quiet(), dtype="float32", device="cpu"
    )  # fmt: skip
    losses = {one["name"]: one["loss"] for one in found["adapters"]}
    told = [event["loss"] for event in upper["told"].events if event["kind"] == "evaluation"]
    assert told[0] == pytest.approx(losses["adapter"], rel=1e-5)
    assert min(told[1:]) == pytest.approx(losses["upper"], rel=1e-5)
    assert min(told[1:]) < told[0]
    assert upper["summary"]["evaluation"]["base"]["loss"] == pytest.approx(found["base"]["loss"], rel=1e-6)


@torch.no_grad()
def test_peft_has_both_at_once(world, upper):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with_peft = peft.PeftModel.from_pretrained(model, upper["out"]).eval()(input_ids=ids).logits
    from rankwise.frozen.load import load_base
    from rankwise.surgery.bank import Bank

    with Bank(load_base(world / "llama", dtype="float32").model) as bank:
        bank.load("a", upper["out"])
        with bank.use("a"):
            torch.testing.assert_close(with_peft, bank.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_stopped_on_the_way_and_resumed_it_is_the_same_to_the_bit(world, adapter, upper, tmp_path):
    class Stopping(Listener):
        def event(self, event):
            if event["kind"] == "step" and event["step"] == 2:
                signal.raise_signal(signal.SIGTERM)

    settings = upper["asked"].model_dump(exclude_unset=True) | {"out": tmp_path / "out"}
    with pytest.raises(Interrupted):
        run_training(TrainRequest(**settings), Stopping())
    run_training(TrainRequest(**settings, resume=True), Quiet())
    assert read(tmp_path / "out" / "rankwise.json")["digest"] == read(upper["out"] / "rankwise.json")["digest"]


def test_what_cannot_stand_beneath_is_refused_before_training(world, tmp_path):
    magnitudes = write_adapter(tmp_path / "dora", world / "llama", form="dora")
    with pytest.raises(SpecError, match="of form dora"):
        run_training(request(world / "llama", world / "train.jsonl", tmp_path / "out", onto=magnitudes), Quiet())
    other = write_adapter(tmp_path / "other", world / "tied")
    with pytest.raises(AdapterMismatchError):
        run_training(request(world / "llama", world / "train.jsonl", tmp_path / "on", onto=other), Quiet())


# ── its optimiser ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_optimiser_is_kept_when_it_is_asked_for_and_there_is_one(world, run, adapter, tmp_path):
    def digest(out, **more):
        asked = request(world / "llama", world / "train.jsonl", tmp_path / out, continue_from=run["out"], **more)
        run_training(asked, Quiet())
        return read(asked.out / "rankwise.json")["digest"]

    assert digest("fresh") != digest("kept", keep_optimiser=True)
    none = request(
        world / "llama", world / "train.jsonl", tmp_path / "x", continue_from=adapter, keep_optimiser=True
    )  # fmt: skip
    with pytest.raises(RunFolderError, match="has no checkpoints"):
        run_training(none, Quiet())


# ── old documents ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def old(world):
    return write_rows(world / "old.jsonl", range(500, 560))


def replayed(world, old, out, share=0.25, **more):
    settings = {"valid": world / "valid.jsonl", "max_steps": 0, "replay": f"{old}:{share}", **more}
    return request(world / "llama", world / "train.jsonl", out, **settings)


def test_old_documents_are_counted_and_told_and_those_held_back_of_them_are_left_alone(world, old, tmp_path):
    told = Listener()
    asked = replayed(world, old, tmp_path / "out", epochs=2)
    run_training(asked, told)
    facts = read(tmp_path / "out" / "rankwise.json")["data"]
    assert facts["train"]["documents"] == 40
    assert [file["path"] for file in facts["replay"]["files"]] == [str(old)]
    assert facts["replay"]["documents"] == 60 - facts["replay"]["held_back_of_it"]
    assert facts["replay"]["held_back_of_it"] == 3
    assert facts["replay"]["each_epoch"] == 13  # of 53 documents, a quarter
    assert "57 documents" in told.texts[0]
    assert "13 of them in an epoch; 3 held back of that file" in told.texts[0]
    steps = [line for line in lines(tmp_path / "out" / "metrics.jsonl") if line["kind"] == "step"]
    tokens = facts["train"]["tokens"] + 13 / 57 * facts["replay"]["tokens"]
    assert sum(step["tokens"] for step in steps) == pytest.approx(2 * tokens, rel=0.02)
    assert read(tmp_path / "out" / "rankwise.json")["training"]["epochs"] == pytest.approx(2, rel=0.02)


def test_what_is_held_back_of_old_documents_is_what_their_own_training_held_back(world, old, tmp_path):
    from rankwise.jobs.documents import read_documents
    from rankwise.jobs.subject import subject_of

    alone = request(world / "llama", old, tmp_path / "alone", seed=4)
    mixed = replayed(world, old, tmp_path / "mixed", seed=4)
    own, both = (read_documents(one, subject_of(one, Quiet()).reader, Quiet()) for one in (alone, mixed))

    def contents(examples, begin=0):
        return {examples.content(i) for i in range(begin, len(examples))}

    learnt = contents(both.train, len(both.train) - both.replay.documents)
    assert learnt == contents(own.train)
    assert not learnt & contents(own.valid)


def test_old_documents_that_are_judged_by_are_left_out(world, old, tmp_path):
    both = tmp_path / "both.jsonl"
    both.write_text(old.read_text(encoding="utf-8") + (world / "valid.jsonl").read_text(encoding="utf-8"), "utf-8")
    run_training(replayed(world, both, tmp_path / "out", epochs=1), Quiet())
    facts = read(tmp_path / "out" / "rankwise.json")["data"]["replay"]
    assert facts["judged_by"] + facts["held_back_of_it"] + facts["documents"] == 66
    assert facts["judged_by"] >= 3
    valid = {"valid": world / "valid.jsonl", "replay": f"{world / 'valid.jsonl'}:0.2"}
    with pytest.raises(DataError, match="also judged by"):
        run_training(request(world / "llama", world / "train.jsonl", tmp_path / "none", **valid), Quiet())


def test_fewer_old_documents_than_the_share_asks_for_are_told(world, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", range(700, 706))
    with pytest.warns(RankwiseWarning, match="4 documents to mix in, and a share of 0.5 would be 40"):
        run_training(replayed(world, few, tmp_path / "out", share=0.5, epochs=1), Quiet())


def test_with_old_documents_a_resumed_run_is_the_same_to_the_bit(world, old, tmp_path):
    class Stopping(Listener):
        def event(self, event):
            if event["kind"] == "step" and event["step"] == 5:
                signal.raise_signal(signal.SIGTERM)

    run_training(replayed(world, old, tmp_path / "whole", epochs=2), Quiet())
    with pytest.raises(Interrupted):
        run_training(replayed(world, old, tmp_path / "out", epochs=2), Stopping())
    with pytest.raises(RunFolderError, match=r"loop\.replay\.share: was 0\.25, is 0\.3"):
        run_training(replayed(world, old, tmp_path / "out", share=0.3, epochs=2, resume=True), Quiet())
    run_training(replayed(world, old, tmp_path / "out", epochs=2, resume=True), Quiet())
    assert read(tmp_path / "out" / "rankwise.json")["digest"] == read(tmp_path / "whole" / "rankwise.json")["digest"]
