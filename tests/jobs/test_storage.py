"""QLoRA from the files to the evidence: a base held in codes, trained on, compared on, talked to."""

import pytest

from rankwise.errors import SpecError
from rankwise.frozen.coded import CodedLinear
from rankwise.jobs.chat import Chat
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.merge import run_merge
from rankwise.jobs.train import run_training
from tests.jobs.world import Listener, read, request


@pytest.mark.parametrize(("storage", "init"), [("nf4", "kaiming"), ("int8", "loftq")])
def test_an_adapter_is_trained_compared_and_merged(storage, init, world, tmp_path):
    out, data = tmp_path / "run", world / "train.jsonl"
    asked = request(world / "llama", data, out, storage=storage, init=init, form="dora")
    found = run_training(asked, Listener())
    assert f"--storage {storage}" in read(out / "rankwise.json")["command"]
    assert read(out / "rankwise.json")["base"]["storage"] == storage
    assert f"storage {storage}" in (out / "README.md").read_text()
    assert found["training"]["stopped"] == "finished"

    held = run_evaluation(str(world / "llama"), [out], [str(data)], Listener(), dtype="float32")
    dense = run_evaluation(str(world / "llama"), [out], [str(data)], Listener(), dtype="float32", storage="dense")
    assert held["base"] != dense["base"], "by itself the base is held as in training"

    talk = Chat(str(world / "llama"), {"a": out}, Listener())
    assert any(isinstance(module, CodedLinear) for module in talk.base.model.modules())
    # Merged into the base as it was before it was put in codes.
    assert run_merge(str(world / "llama"), out, tmp_path / "merged", Listener())["layers"] > 0


def test_loftq_on_a_dense_base_is_refused_when_it_is_asked_for(world, tmp_path):
    with pytest.raises(SpecError, match="needs storage int8 or nf4"):
        request(world / "llama", world / "train.jsonl", tmp_path, init="loftq")
