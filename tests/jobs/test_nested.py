"""Nested ranks from files to answers: trained once, used at the rank that is asked for."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rankwise.errors import AdapterFileError, SpecError
from rankwise.formats.peft import read_adapter
from rankwise.formats.record import nested_ranks
from rankwise.frozen.load import load_base
from rankwise.jobs.chat import Chat
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.inspect import run_inspection
from rankwise.jobs.merge import run_merge
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from rankwise.surgery.bank import Bank
from tests.jobs.test_request import LEAST, asked
from tests.jobs.world import read, request

EXACT = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def nested(world):
    made = request(world / "llama", world / "train.jsonl", world / "nested", rank=4, lr=1e-2, nested=True)
    run_training(made, Quiet())
    return made.out


@pytest.fixture(scope="module")
def plain_two(world, nested):
    """Its first two directions, as a folder of their own."""
    folder = world / "plain-two"
    with Bank(load_base(world / "llama", dtype="float32").model) as bank:
        bank.load("two", nested, rank=2)
        bank.save("two", folder)
    return folder


def evaluated(world, adapters, **settings):
    found = run_evaluation(
        str(world / "llama"), adapters, [str(world / "test.jsonl")], Quiet(), **EXACT, train_on="all", **settings
    )
    return {one["name"]: one for one in found["adapters"]}


def test_the_folder_says_that_it_is_nested_and_at_which_ranks(nested):
    assert read(nested / "rankwise.json")["nested"] == [1, 2, 4]
    assert read_adapter(nested).nested == (1, 2, 4)
    assert run_inspection(str(nested))["nested"] == [1, 2, 4]


def test_ranks_are_measured_side_by_side_each_as_the_plain_adapter(world, nested, plain_two):
    found = evaluated(world, [nested], ranks=[1, 2, 4])
    assert list(found) == ["nested at rank 1", "nested at rank 2", "nested at rank 4"]
    assert found["nested at rank 2"]["loss"] == pytest.approx(evaluated(world, [plain_two])["plain-two"]["loss"])
    assert found["nested at rank 4"]["loss"] == evaluated(world, [nested])["nested"]["loss"]
    assert len({one["loss"] for one in found.values()}) == 3


def test_a_rank_is_merged(world, nested, plain_two, tmp_path):
    for name, adapter, rank in (("a", nested, 2), ("b", plain_two, None)):
        run_merge(str(world / "llama"), adapter, tmp_path / name, Quiet(), rank=rank)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)
    base = AutoModelForCausalLM.from_pretrained(world / "llama").state_dict()
    assert any(not torch.equal(one[key], base[key]) for key in base)


def test_a_rank_is_talked_to_and_switched_while_the_base_stays(world, nested, plain_two):
    talk = Chat(str(world / "llama"), {"a": nested, "b": plain_two}, Quiet(), max_new_tokens=12)
    answers = {}
    for who in ("a@2", "b", "a"):
        talk.reset()
        talk.use(who)
        answers[who] = talk.reply("what is 3 and 3?")
    assert answers["a@2"] == answers["b"]
    for who, complaint in (("a@9", "ranks 1 to 4"), ("b@1", "not nested"), ("a@x", "expected a rank")):
        with pytest.raises(SpecError, match=complaint):
            talk.use(who)
    assert talk.speaking == "a"


def test_what_is_not_nested_has_no_ranks_to_choose_from(world, adapter, nested, tmp_path):
    with pytest.raises(SpecError, match="not nested"):
        evaluated(world, [adapter], ranks=[2])
    with pytest.raises(SpecError, match=r"ranks 1 to 4\n.*1, 2, 4"):
        evaluated(world, [nested], ranks=[2, 5])
    with pytest.raises(SpecError, match="not nested"):
        run_merge(str(world / "llama"), adapter, tmp_path / "m", Quiet(), rank=2)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("said", ["4", [0], [1.5], [True], {"1": 2}])
def test_a_record_that_says_no_ranks_is_no_record(tmp_path, said):
    base = '{"name": "m", "fingerprint": "f"}'
    told = str(said).replace("'", '"').replace("True", "true")
    (tmp_path / "rankwise.json").write_text(f'{{"schema": 1, "base": {base}, "nested": {told}}}')
    with pytest.raises(AdapterFileError, match="no list of ranks"):
        nested_ranks(tmp_path)


def test_it_is_asked_for_with_form_lora_and_a_start_at_the_base():
    made = TrainRequest(**LEAST, nested=True, rank=8)
    assert made.run.nested
    assert asked(made.command()) == made
    for settings in ({"form": "dora"}, {"form": "adalora"}, {"init": "pissa"}):
        with pytest.raises(SpecError, match="nested ranks take form lora"):
            TrainRequest(**LEAST, nested=True, **settings)
    with pytest.raises(SpecError, match="leave out nested"):
        TrainRequest(**LEAST, nested=True, onto="first")
    with pytest.raises(SpecError, match="without an adapter; leave out nested"):
        TrainRequest(**LEAST, nested=True, form="full")
