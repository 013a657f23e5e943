"""Every method on every task, from the files to the evidence; and new tokens where there is something to be said."""

import peft
import pytest
import torch
import transformers as hf

from rankwise.errors import SpecError
from rankwise.frozen.coded import CodedLinear
from rankwise.frozen.load import load_base
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.merge import run_merge
from rankwise.jobs.train import run_training
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Quiet
from rankwise.surgery.bank import Bank
from rankwise.tasks import TASKS
from tests.jobs.tasks import BASES, write_task
from tests.jobs.world import read, request

ALL = pytest.mark.parametrize("task", BASES)
METHODS = [{"storage": "nf4", "form": "dora"}, {"storage": "int8", "form": "adalora"}]
SETTINGS = {"lr": 2e-2, "rank": 4, "batch_documents": 8, "batch_tokens": None, "max_steps": 3, "device": "cpu"}


@ALL
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_adapter_is_trained_compared_and_merged(task, method, tmp_path):
    files = write_task(tmp_path, task)
    summary = run_training(request(**files, out=tmp_path / "run", task=task, **SETTINGS, **method), Quiet())
    record = read(tmp_path / "run" / "rankwise.json")
    assert record["base"]["storage"] == method["storage"]
    if method["form"] == "adalora":
        ranks = [site["rank"] for site in record["sites"].values()]
        assert sum(ranks) < 4 * len(ranks), "the budget has fallen"
    found = run_evaluation(str(files["model"]), [tmp_path / "run"], [str(files["test"])], Quiet(), dtype="float32")
    want = summary["evaluation"]["adapters"][0]["loss"]
    assert found["adapters"][0]["loss"] == pytest.approx(want, rel=1e-6), "the base is held as in training"
    assert run_merge(str(files["model"]), tmp_path / "run", tmp_path / "merged", Quiet())["layers"] > 0


@pytest.mark.parametrize("task", [task for task in BASES if TASKS[task].classifies])
def test_a_fresh_head_is_never_held_in_codes(task, tmp_path):
    base = load_base(write_task(tmp_path, task)["model"], task=task, classes=("a", "b", "c"), storage="nf4")
    coded = {path for path, module in base.model.named_modules() if isinstance(module, CodedLinear)}
    assert coded
    assert base.fresh
    assert not any(path == fresh or path.startswith(f"{fresh}.") for path in coded for fresh in base.fresh)


@pytest.mark.parametrize("task", [task for task in BASES if task != "seq2seq"])
def test_new_tokens_are_refused_where_nothing_is_said(task, tmp_path):
    with pytest.raises(SpecError, match=f"what a model says, which task {task} does not teach"):
        request("base", "data", tmp_path, task=task, add_tokens=("<tool>",), batch_tokens=None)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_new_tokens_of_an_encoder_and_decoder_are_read_by_peft_and_merged(tmp_path):
    files = write_task(tmp_path, "seq2seq")
    asked = request(**files, out=tmp_path / "run", task="seq2seq", add_tokens=("twice",), **SETTINGS, dtype="float32")
    with torch.enable_grad():
        run_training(asked, Quiet())
    loaded = load_base(files["model"], task="seq2seq", dtype="float32", device="cpu")
    base = with_tokens_of(loaded, [asked.out], force=False)
    size = len(base.tokenizer)
    inputs = {"input_ids": torch.tensor([[5, size - 1, 9, 1]]), "decoder_input_ids": torch.tensor([[0, size - 1, 7]])}
    bank = Bank(base.model)
    bank.load("a", asked.out)
    with bank.use("a"):
        want = base.model(**inputs).logits
    assert want.shape[-1] == size
    clean = hf.T5ForConditionalGeneration.from_pretrained(files["model"])
    clean.resize_token_embeddings(size)
    theirs = peft.PeftModel.from_pretrained(clean, asked.out).eval()
    torch.testing.assert_close(theirs(**inputs).logits, want, rtol=1e-5, atol=1e-5)
    found = run_merge(str(files["model"]), asked.out, tmp_path / "merged", Quiet())
    assert found["tokens"] == 1
    merged = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(**inputs).logits, want, rtol=1e-4, atol=1e-5)
