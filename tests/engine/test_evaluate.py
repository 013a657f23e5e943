"""Evaluation: the losses of a plain float64 reference, document by document, in memory that does not grow with them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from rankwise.engine.evaluate import evaluate
from rankwise.engine.paired import paired_difference
from rankwise.errors import BankError, DataError
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import spec, state_of, trained
from tests.models import ARCHITECTURES, CAUSAL, tiny

LENGTHS = [9, 2, 30, 17, 3, 24, 9]
EXACT = {"mixtral": torch.float32}  # float64 but for transformers' experts, whose grouped product does not take it


def held(name: str, dtype: torch.dtype) -> Bank:
    bank = Bank(tiny(name).to(dtype))
    trained(bank, "one", spec(ARCHITECTURES[name].targets), seed=1)
    trained(bank, "other", spec("all-linear", rank=2), seed=2)
    return bank


@torch.no_grad()
def reference(bank: Bank, corpus, name: str | None) -> list[float]:
    """All logits of one document at a time, transformers' own attention, everything in float64."""
    losses = []
    for i in range(len(corpus)):
        tokens, mask = (torch.as_tensor(x).long() for x in corpus.document(i))
        with bank.use(name):
            logits = bank.model(input_ids=tokens[None]).logits[0, :-1]
        each = -logits.double().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        losses.append(float(each[mask[1:].bool()].sum()))
    return losses


@pytest.mark.parametrize("name", CAUSAL)
def test_each_document_has_the_loss_of_a_plain_float64_reference(name):
    corpus = random_corpus(LENGTHS, supervised=0.7)
    with held(name, EXACT.get(name, torch.float64)) as exact:
        want = {adapter: reference(exact, corpus, adapter) for adapter in (None, "one", "other")}
    with held(name, torch.float32) as bank:
        before = state_of(bank.model)
        found = evaluate(bank, ["one", "other"], corpus, micro_tokens=35)
        assert state_of(bank.model) == before
    np.testing.assert_allclose(found.base, want[None], rtol=1e-5)
    np.testing.assert_allclose(found.losses, [want["one"], want["other"]], rtol=1e-5)
    assert np.abs(found.losses - found.base).mean() > 0.1, "the adapters do too little for the test to see"


def test_how_many_tokens_go_at_once_changes_nothing_and_every_document_is_counted():
    corpus = random_corpus(LENGTHS)
    with held("llama", torch.float32) as bank:
        found = []
        for micro_tokens in (1, 31, 10_000):
            told: list[tuple[int, int]] = []
            found.append(
                evaluate(
                    bank,
                    ["one"],
                    corpus,
                    micro_tokens=micro_tokens,
                    progress=lambda done, of, told=told: told.append((done, of)),
                )
            )
            assert told[-1] == (len(corpus), len(corpus))
            assert [done for done, _ in told] == sorted({done for done, _ in told})
    for other in found[1:]:
        np.testing.assert_allclose(other.losses, found[0].losses, rtol=1e-5)
        np.testing.assert_allclose(other.base, found[0].base, rtol=1e-5)


def test_what_is_said_follows_from_the_losses():
    corpus = random_corpus(LENGTHS)
    with held("llama", torch.float32) as bank:
        found = evaluate(bank, ["other", "one"], corpus)
    assert found.names == ("other", "one")
    assert found.tokens.tolist() == corpus.supervised_counts().tolist()
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["documents"] == len(corpus)
    assert summary["tokens"] == corpus.supervised.sum()
    assert summary["base"]["loss"] == pytest.approx(found.base.sum() / corpus.supervised.sum())
    for row, losses in zip(summary["adapters"], found.losses, strict=True):
        delta = paired_difference(losses, found.base, found.tokens)
        assert row["delta"] == {"mean": delta.mean, "low": delta.low, "high": delta.high}
        assert row["loss"] - summary["base"]["loss"] == pytest.approx(delta.mean)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["confidence"] == 0.95
    assert record["per_document"]["base"] == found.base.tolist()
    assert record["per_document"]["adapters"]["one"] == found.losses[1].tolist()


def test_the_base_alone_can_be_measured():
    with Bank(tiny("llama")) as bank:
        found = evaluate(bank, [], random_corpus(LENGTHS))
    assert found.losses.shape == (0, len(LENGTHS))
    assert found.record()["confidence"] is None
    assert found.summary()["adapters"] == []


def test_an_unknown_adapter_and_too_few_documents_are_errors():
    with held("llama", torch.float32) as bank:
        with pytest.raises(BankError, match="did you mean 'other'"):
            evaluate(bank, ["othr"], random_corpus(LENGTHS))
        with pytest.raises(DataError, match="at least two"):
            evaluate(bank, ["one"], random_corpus([9]))


def test_not_a_number_stays_with_its_adapter():
    with held("llama", torch.float32) as bank:
        next(bank.named_parameters("one"))[1].data.fill_(torch.nan)
        found = evaluate(bank, ["one", "other"], random_corpus(LENGTHS))
    assert np.isnan(found.losses[0]).all()
    assert np.isfinite(found.losses[1]).all()
    assert np.isfinite(found.base).all()


MEMORY = """
import resource
import numpy as np, torch, transformers as hf
from rankwise.data.corpus import Corpus
from rankwise.engine.evaluate import evaluate
from rankwise.surgery.bank import Bank
from tests.grid import spec
from tests.models import LLAMA

VOCAB = 8_000
torch.set_num_threads(2)
model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**LLAMA | {"vocab_size": VOCAB}))

def corpus(documents):
    bounds = 5 * np.arange(documents + 1)
    tokens = np.random.default_rng(0).integers(VOCAB, size=bounds[-1]).astype(np.int32)
    mask = np.arange(len(tokens)) % 5 > 0
    return Corpus(tokens, mask, bounds, np.ones((documents, 2), dtype=np.int64), ("x.jsonl",))

with Bank(model) as bank:
    bank.add("a", spec("all-linear"))
    for documents in (200, 1200):
        evaluate(bank, ["a"], corpus(documents), micro_tokens=500)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_documents():
    """The logits of the 1,000 documents more are 128 MB for each of the two models."""
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    few, many = (int(line) / 1024 for line in done.stdout.split())
    assert many - few < 40, f"{few:.0f} MB for 200 documents, {many:.0f} MB for 1,200"
