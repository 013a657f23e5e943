"""Rows of tokens in training: through the head in chunks, beside other adapters, and as plain torch learns them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rankwise.data.corpus import Corpus
from rankwise.data.order import Order
from rankwise.engine import head
from rankwise.engine.evaluate import document_losses
from rankwise.engine.forward import Forward
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.engine.test_forward import alone, gradients, runs_of
from tests.grid import relative, spec, state_of, trained
from tests.models import CAUSAL, VOCAB, tiny
from tests.surgery.test_tokens import NEW, OLD, lora

LENGTHS = [9, 2, 30, 17, 12]
NAMES = ["one", None, "other", "one", "plain"]
WEIGHTS = np.array([0.5, 1.0, 0.1, 0.3, 0.2])


def corpus_with_new(lengths: list[int], new: tuple[int, ...] = NEW) -> Corpus:
    """Random documents in which every fourth token is one of the new ones."""
    corpus = random_corpus(lengths)
    corpus.tokens[1::4] = np.resize(new, len(corpus.tokens[1::4]))
    return corpus


@pytest.mark.parametrize("chunk", ["whole", "three rows"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_packed_equals_alone(name, checkpointing, chunk, monkeypatch):
    """Two adapters that call other tokens by the same numbers, one without any, and the base."""
    if chunk == "three rows":
        monkeypatch.setattr(head, "chunk_rows", lambda *_: 3)
    model, corpus = tiny(name), corpus_with_new(LENGTHS)
    with Bank(model) as bank:
        trained(bank, "one", lora(name, new_tokens=NEW, trained_tokens=OLD), seed=1)
        trained(bank, "other", lora(name, new_tokens=(*NEW, VOCAB + 2), rank=2), seed=2)
        trained(bank, "plain", lora(name), seed=3)
        before = state_of(model)
        want, want_gradients = alone(bank, corpus, NAMES, WEIGHTS)
        with Forward(bank, checkpointing=checkpointing) as forward:
            assert forward.layout == "packed", forward.reason
            got = forward.learn(corpus, range(5), runs_of(NAMES), WEIGHTS, tick=1)
            found = gradients(bank)
            measured = forward.measure(corpus, range(5), runs_of(NAMES))
        assert state_of(model) == before
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    np.testing.assert_allclose(measured.documents, want, rtol=1e-5)
    for path, gradient in want_gradients.items():
        assert gradient.norm() > 0, path
        assert relative(found[path], gradient) < 1e-4, path


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_bfloat16_on_compiled_kernels_stays_near_the_truth(name):
    corpus, found = corpus_with_new([40, 25, 60]), {}
    for dtype in (torch.bfloat16, torch.float32):
        with Bank(tiny(name, torch.bfloat16).to(dtype)) as bank:
            trained(bank, "a", lora(name, new_tokens=NEW, trained_tokens=OLD), size=0.1)
            with Forward(bank) as forward:
                losses = forward.learn(corpus, range(3), [("a", 3)], np.ones(3) / 50, tick=1)
                found[dtype] = losses.documents, gradients(bank)
    low, high = found[torch.bfloat16], found[torch.float32]
    np.testing.assert_allclose(low[0], high[0], rtol=0.02)
    for path in high[1]:
        assert relative(low[1][path], high[1][path]) < 0.1, path


def plain_losses(model, corpus: Corpus, batches: list[np.ndarray], run: Run, learning: dict[str, list[int]]):
    """The loop written out on an enlarged model: autograd over whole matrices, of which these rows alone learn."""
    model.requires_grad_(False)
    weights = {path: model.get_submodule(path).weight for path in learning}
    rows = {path: weights[path][ids].clone().requires_grad_() for path, ids in learning.items()}
    optimiser = torch.optim.AdamW(rows.values(), lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=0.0)
    losses = []
    for batch in batches:
        for weight in weights.values():
            weight.requires_grad_(True).grad = None
        documents = [corpus.document(int(i)) for i in batch]
        total, count = torch.zeros(()), sum(int(mask.sum()) for _, mask in documents)
        for tokens, mask in documents:
            ids = torch.as_tensor(tokens.astype(np.int64))
            each = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total = total + each[torch.as_tensor(mask[1:])].sum()
        (total / count).backward()
        for path, ids in learning.items():
            rows[path].grad = weights[path].grad[ids].clone()
        torch.nn.utils.clip_grad_norm_(rows.values(), run.clip)
        optimiser.step()
        with torch.no_grad():
            for path, ids in learning.items():
                weights[path][ids] = rows[path]
        losses.append(float(total.detach()) / count)
    return losses, rows


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_training_rows_is_training_them_in_plain_torch(name):
    """The low-rank part, which every adapter has, is kept from learning by its scale."""
    corpus, run = corpus_with_new([8] * 12), Run(lr=1e-2, schedule="constant", warmup=0, weight_decay=0.1)
    model, plain, ids = tiny(name), tiny(name), [*NEW, *OLD]
    plain.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    told: list[dict] = []
    with Bank(model) as bank:
        bank.add("a", lora(name, rank=1, alpha=1e-12, new_tokens=NEW, trained_tokens=OLD))
        starts = {path: rows.rows.detach().clone() for path, rows in bank.adapter("a").tokens.items()}
        with torch.no_grad():
            for path, rows in bank.adapter("a").tokens.items():
                plain.get_submodule(path).weight[rows.ids] = rows.rows
        train(bank, {"a": run}, corpus, loop=Loop(batch_documents=3, max_steps=4), observe=told.append)
        learnt = {path: (rows.tokens, rows.rows.detach().clone()) for path, rows in bank.adapter("a").tokens.items()}
    order = Order(corpus.lengths(), 0, Loop().batch_tokens, 3)
    batches = [order.step(step)[1] for step in range(4)]
    losses, want = plain_losses(plain, corpus, batches, run, {path: own for path, (own, _) in learnt.items()})
    np.testing.assert_allclose([event["loss"] for event in told if event["kind"] == "step"], losses, rtol=1e-4)
    for path, (own, rows) in learnt.items():
        assert sorted(own) == sorted(ids)
        assert relative(rows - starts[path], want[path].detach() - starts[path]) < 1e-2, path


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "granite", "qwen3"])
def test_what_new_tokens_cost_the_base_is_bounded(name):
    """By log(1 + n/V) a token, since their rows are at the mean."""
    corpus, model = random_corpus(LENGTHS), tiny(name)
    found = []
    with Bank(model) as bank:
        for new in ((), NEW):
            bank.add(f"a{len(new)}", lora(name, new_tokens=new))
            with Forward(bank) as forward:
                found.append(document_losses(forward, corpus, [None], 1000)[0] / corpus.supervised_counts())
    risen = found[1] - found[0]
    assert (risen > 0).all()
    assert (risen < math.log(1 + 2 / VOCAB)).all()


def test_an_adapter_learns_a_new_token_and_the_base_is_what_it_was():
    model = tiny("llama-tied", torch.bfloat16)
    before = state_of(model)
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, VOCAB, size=(60, 8)).astype(np.int32)
    tokens[:, 4], tokens[:, 5] = NEW  # one calls for the other
    mask = np.zeros((60, 8), dtype=bool)
    mask[:, 5] = True
    lines = np.stack([np.zeros(60), 1 + np.arange(60)], axis=1).astype(np.int64)
    corpus = Corpus(tokens.reshape(-1), mask.reshape(-1), np.arange(61) * 8, lines, ("pairs",))
    told: list[dict] = []
    with Bank(model) as bank:
        bank.add("a", spec("minimal", new_tokens=NEW))
        train(bank, {"a": Run(lr=3e-2)}, corpus, loop=Loop(epochs=4, batch_documents=10), observe=told.append)
        losses = [event["loss"] for event in told if event["kind"] == "step"]
        assert losses[-1] < 0.2 * losses[0]
        with bank.use("a"), torch.no_grad():
            assert int(model(input_ids=torch.tensor([[5, 6, NEW[0]]])).logits[0, -1].argmax()) == NEW[1]
    assert state_of(model) == before
