"""Nested ranks, held against autograd in float64, PEFT, and adapters that were trained in the usual way."""

import os
import signal

import numpy as np
import peft
import pytest
import torch
from torch.func import functional_call

from rankwise.data.order import Order
from rankwise.engine.evaluate import measured
from rankwise.engine.folder import held_folder
from rankwise.engine.forward import Forward
from rankwise.engine.interrupt import Interrupted
from rankwise.engine.loop import train
from rankwise.engine.nested import Nested, nested_grid
from rankwise.engine.run import Loop, Run
from rankwise.errors import SpecError
from rankwise.surgery.bank import Bank
from rankwise.surgery.routing import Prefix
from tests.corpora import pattern_corpus, random_corpus
from tests.grid import relative, spec, trained
from tests.models import ARCHITECTURES, tiny

CORPUS = random_corpus([7, 9, 5, 12, 3, 20, 8, 11])
RULES = {"alpha/r": lambda a, r: a / r, "alpha/sqrt(r)": lambda a, r: a / r**0.5, "alpha": lambda a, r: a}
# With such an epsilon and no memory AdamW's step is lr / eps times the gradient: one step tells the gradient.
DESCENT = Run(lr=1e8, eps=1e8, betas=(0.0, 0.0), clip=1e9, schedule="constant", warmup=0, nested=True)


def lessons_of(seed, step, documents, rank=8):
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(rank=rank))
        return Nested(bank, "a", seed).lessons(step, documents)


def rank_of(way, rank=8):
    return way.rank if isinstance(way, Prefix) else rank


# ── which prefix a document takes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_every_document_of_a_step_takes_one_prefix_and_with_four_all_kinds_are_there(count, rank):
    documents = np.arange(100, 100 + count)
    for step in range(20):
        lessons = lessons_of(0, step, documents, rank)
        assert sorted(np.concatenate([lesson.documents for lesson in lessons])) == list(documents)
        ranks = [rank_of(lesson.way, rank) for lesson in lessons]
        assert set(ranks) <= set(nested_grid(rank))
        assert {rank, 1} <= set(ranks)
        if count >= 4:
            assert all(len(lesson.documents) for lesson in lessons)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_shares_are_right_in_the_mean_however_few_the_documents(count):
    met = dict.fromkeys(nested_grid(8), 0)
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(rank=8))
        nested, steps = Nested(bank, "a", 0), 4000
        for step in range(steps):
            for lesson in nested.lessons(step, np.arange(count)):
                met[rank_of(lesson.way)] += len(lesson.documents)
    found = {rank: times / steps / count for rank, times in met.items()}
    assert found == pytest.approx({8: 1 / 2, 1: 1 / 4, 2: 1 / 8, 4: 1 / 8}, abs=0.03)


def test_the_chance_is_the_seed_s_and_the_step_s_alone():
    documents = np.arange(40)

    def said(seed, step):
        torch.manual_seed(seed + step)
        np.random.seed(step)
        return [(str(one.way), one.documents.tolist()) for one in lessons_of(seed, step, documents)]

    assert said(0, 3) == said(0, 3)
    assert len({str(said(seed, step)) for seed, step in [(0, 3), (0, 4), (1, 3)]}) == 3


# ── the gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────


def objective(model, A, B, alpha, rule, ranks):
    """By torch alone: each document of the corpus through W + s(r)·B[:, :r]·A[:r], over all supervised tokens."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    total = 0.0
    for i, rank in ranks.items():
        s = RULES[rule](alpha, rank)
        own = {f"{p}.weight": weights[f"{p}.weight"] + s * B[p][:, :rank] @ A[p][:rank] for p in A}
        tokens, mask = (torch.as_tensor(array).long() for array in CORPUS.document(i))
        logits = functional_call(model, weights | own, kwargs={"input_ids": tokens[None]}).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total = total + (each * mask[1:]).sum()
    return total / sum(int(CORPUS.document(i)[1][1:].sum()) for i in ranks)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_s_gradient_is_autograd_s_of_the_objective(rule, micro_tokens, checkpointing):
    loop = Loop(max_steps=1, batch_documents=8, micro_tokens=micro_tokens, checkpointing=checkpointing, seed=3)
    chosen = spec("all-linear", rank=5, alpha=3, scaling=rule)
    wide = tiny("llama").double()
    told = []
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", chosen)
        before = {name: p.detach().clone() for name, p in bank.named_parameters("a")}
        _, documents = Order(CORPUS.lengths(), 3, loop.batch_tokens, 8).step(0)
        lessons = Nested(bank, "a", 3).lessons(0, documents)
        train(bank, {"a": DESCENT}, CORPUS, loop=loop, observe=told.append)
        found = {name: before[name] - p.detach() for name, p in bank.named_parameters("a")}
    ranks = {int(i): rank_of(lesson.way, 5) for lesson in lessons for i in lesson.documents}
    assert {1, 5} < set(ranks.values())
    masters = {name: tensor.double().requires_grad_() for name, tensor in before.items()}
    A, B = ({n[:-2]: t for n, t in masters.items() if n.endswith(f".{part}")} for part in "AB")
    loss = objective(wide, A, B, 3, rule, ranks)
    loss.backward()
    assert [e["loss"] for e in told if e["kind"] == "step"] == pytest.approx([loss.item()], rel=1e-5)
    for name, master in masters.items():
        assert relative(found[name], master.grad) < 1e-3, name


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_in_a_stream_is_the_plain_adapter_of_its_rank(name, dtype):
    """Its losses and its gradient; what lies behind it has none."""
    runs = [("a", 2), ("two", 3), (None, 1), ("one", 2)]
    weights, documents = np.linspace(0.1, 1, 8), np.arange(8)

    def passed(ways):
        with Bank(tiny(name).to(dtype)) as bank:
            trained(bank, "a", spec(ARCHITECTURES[name].targets, rank=4))
            bank.nest("a", (1, 2, 4))
            parts = {"one": bank.prefix("a", 1), "two": bank.prefix("a", 2)}
            plain = {way: bank.adapter("a").prefix(part.rank) for way, part in parts.items()}
            for way, adapter in plain.items() if ways == "plain" else ():
                bank.put(way, adapter)
            taken = [(parts.get(way, way) if ways == "prefixes" else way, count) for way, count in runs]
            with Forward(bank) as forward:
                losses = forward.learn(CORPUS, documents, taken, weights, 0).documents
            return losses, {n: {p: t.grad for p, t in bank.named_parameters(n)} for n in bank.names}

    losses, found = passed("prefixes")
    plain_losses, plain = passed("plain")
    np.testing.assert_array_equal(losses, plain_losses)
    for path, grad in found["a"].items():
        want = plain["a"][path].double()
        for way, rank in (("one", 1), ("two", 2)):
            own = plain[way][path].double()
            want[(slice(rank),) if path.endswith(".A") else (slice(None), slice(rank))] += own
        assert relative(grad, want) < 1e-5, path


# ── laws of training ─────────────────────────────────────────────────────────────────────────────────────────────────


def learnt(runs, specs, loop, corpus=CORPUS, out=None, **settings):
    told = []
    with Bank(tiny("llama")) as bank:
        for name in runs:
            bank.add(name, specs[name], seed=1)
        settings = {"observe": told.append} | settings
        if out is None:
            train(bank, runs, corpus, loop=loop, **settings)
        else:
            with held_folder(out, resume=settings.get("resume", False)) as folder:
                train(bank, runs, corpus, loop=loop, out=folder, **settings)
        losses = {name: [e["loss"] for e in told if e["kind"] == "step" and e["adapter"] == name] for name in runs}
        return losses, {name: bank.adapter(name) for name in runs}


def test_trained_beside_others_equals_alone():
    runs = {"a": Run(lr=5e-3, nested=True), "b": Run(lr=5e-3), "c": Run(lr=1e-2, nested=True)}
    specs = {"a": spec(rank=8, dropout=0.2), "b": spec("minimal", rank=1), "c": spec(("lm_head", "up_proj"), rank=3)}
    loop = Loop(batch_tokens=40, epochs=2)
    together, adapters = learnt(runs, specs, loop)
    for name, run in runs.items():
        alone, _ = learnt({name: run}, specs, loop)
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-5)
    assert {name: adapter.nested for name, adapter in adapters.items()} == {"a": (1, 2, 4, 8), "b": (), "c": (1, 2, 3)}


def test_dropout_acts_on_prefixes():
    loop = Loop(batch_tokens=40, epochs=1)
    dry, _ = learnt({"a": Run(nested=True)}, {"a": spec(rank=4, init="gaussian")}, loop)
    wet, _ = learnt({"a": Run(nested=True)}, {"a": spec(rank=4, init="gaussian", dropout=0.5)}, loop)
    assert dry["a"][0] == wet["a"][0]  # B is zero yet
    assert dry["a"][-1] != wet["a"][-1]


@pytest.mark.parametrize("when", [1, 3])
def test_a_run_stopped_and_resumed_equals_one_that_was_not_to_the_bit(tmp_path, when):
    how = {"a": Run(lr=5e-3, nested=True)}, {"a": spec(rank=8, dropout=0.2)}, Loop(batch_tokens=40, max_steps=6)

    def stop(event):
        if event["kind"] == "step" and event["step"] == when:
            os.kill(os.getpid(), signal.SIGTERM)

    _, whole = learnt(*how, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        learnt(*how, out=tmp_path / "cut", observe=stop)
    _, resumed = learnt(*how, out=tmp_path / "cut", resume=True)
    assert resumed["a"].digest() == whole["a"].digest()
    assert resumed["a"].nested == whole["a"].nested == (1, 2, 4, 8)


@pytest.mark.parametrize("chosen", [{"form": "dora"}, {"form": "adalora"}, {"init": "pissa"}])
def test_what_has_no_prefixes_is_refused(chosen):
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(rank=4, **chosen))
        with pytest.raises(SpecError, match="nested ranks take"):
            train(bank, {"a": Run(nested=True)}, CORPUS, loop=Loop(max_steps=1))
        with pytest.raises(SpecError, match="nested ranks take"):
            bank.prefix("a", 2)


def test_what_is_trained_further_at_one_rank_is_nested_no_more():
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(rank=4))
        train(bank, {"a": Run(nested=True)}, CORPUS, loop=Loop(max_steps=2))
        assert bank.adapter("a").nested == (1, 2, 4)
        train(bank, {"a": Run()}, CORPUS, loop=Loop(max_steps=2))
        assert bank.adapter("a").nested == ()


# ── what comes of it ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_small_prefixes_are_better_than_those_of_an_adapter_trained_at_one_rank():
    loop, unseen = Loop(batch_documents=8, max_steps=40), pattern_corpus(60, seed=9)
    found = {}
    for nested in (False, True):
        with Bank(tiny("llama")) as bank:
            bank.add("a", spec(rank=8, alpha=16))
            train(bank, {"a": Run(lr=1e-2, nested=nested)}, pattern_corpus(200), loop=loop)
            ways = [None, *(bank.prefix("a", rank) for rank in (1, 2, 4)), "a"]
            found[nested] = measured(bank, ways, unseen)[0].sum(1) / unseen.supervised_counts().sum()
    base, *parts, whole = found[True]
    assert all(nested < plain for nested, plain in zip(parts, found[False][1:4], strict=True))
    assert base > parts[0] > parts[1] > parts[2] > whole  # and each rank is worth its numbers


def test_a_saved_prefix_says_in_peft_what_it_says_here(tmp_path):
    tokens = torch.tensor([[5, 9, 20, 33, 4]])
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(rank=4))
        train(bank, {"a": Run(lr=1e-2, nested=True)}, CORPUS, loop=Loop(batch_tokens=40, epochs=2))
        with torch.no_grad(), bank.use(bank.prefix("a", 2)):
            want = bank.model(input_ids=tokens).logits
        bank.save("a", tmp_path / "whole")
    with Bank(tiny("llama")) as bank:
        bank.load("two", tmp_path / "whole", rank=2)
        bank.save("two", tmp_path / "two")
    with torch.no_grad():
        read = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "two")
        assert relative(read(input_ids=tokens).logits, want) < 1e-6
        base = tiny("llama")(input_ids=tokens).logits
    assert relative(base, want) > 1e-3
