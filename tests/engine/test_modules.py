"""Modules that an adapter trains whole: their gradients, their training, their files, and the base beneath them."""

import copy

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F

from rankwise.data.order import Order
from rankwise.engine.evaluate import evaluate
from rankwise.engine.folder import held_folder
from rankwise.engine.forward import Forward
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.errors import RouteError
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus, random_corpus
from tests.engine.test_forward import alone, gradients, runs_of
from tests.grid import relative, spec, state_of, trained
from tests.models import tiny

LENGTHS = [9, 2, 30, 17]
WHOLE = {
    "llama": (("lm_head",), ("norm",), ("embed_tokens",), ("layers.1.mlp",), ("input_layernorm", "lm_head")),
    "llama-tied": (("lm_head",), ("embed_tokens",)),
    "gpt2": (("ln_f",), ("wpe",)),
    "gemma2": (("lm_head",), ("pre_feedforward_layernorm",)),
}
CASES = [(name, modules) for name, choices in WHOLE.items() for modules in choices]


def whole_spec(modules: tuple[str, ...], **settings):
    return spec("minimal", rank=2, modules_to_save=modules, **settings)


@pytest.mark.parametrize(("name", "modules"), CASES, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_a_mixed_stream_equal_those_of_documents_alone(name, modules, checkpointing):
    """One adapter with modules of its own, one without, and the bare base, in one stream."""
    names, weights, corpus = ["one", None, "other", "one"], np.array([0.5, 1.0, 0.1, 0.3]), random_corpus(LENGTHS)
    model = tiny(name)
    with Bank(model) as bank:
        trained(bank, "one", whole_spec(modules), seed=1, size=0.1)
        trained(bank, "other", spec("minimal", rank=2), seed=2)
        before = state_of(model)
        want, want_gradients = alone(bank, corpus, names, weights)
        with Forward(bank, checkpointing=checkpointing) as forward:
            got = forward.learn(corpus, range(4), runs_of(names), weights, tick=1)
            found = gradients(bank)
        assert state_of(model) == before
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    for path, gradient in want_gradients.items():
        assert gradient.norm() > 0, path
        assert relative(found[path], gradient) < 1e-4, path


WITH_ATTENTION = [
    ("llama", ("layers.0.self_attn",), ("gate_proj",)),
    ("llama", ("layers.0",), ("layers.1.mlp.gate_proj",)),
    ("gemma2", ("self_attn",), ("up_proj",)),
    ("gpt2", ("h.0",), ("h.1.mlp.c_fc",)),
    ("mixtral", ("mlp",), ("q_proj",)),
]


@pytest.mark.parametrize(("name", "modules", "targets"), WITH_ATTENTION, ids=str)
def test_attention_that_is_trained_whole_sees_no_neighbours_either(name, modules, targets):
    """A copy of it must attend as the model does at the moment, and not as it did when the copy was made."""
    weights, corpus = np.array([0.5, 1.0, 0.1, 0.3]), random_corpus(LENGTHS)
    with Bank(tiny(name)) as bank:
        trained(bank, "one", spec(targets, modules_to_save=modules), seed=1, size=0.1)
        want, want_gradients = alone(bank, corpus, ["one"] * 4, weights)
        with Forward(bank) as forward:
            assert forward.layout == "packed"
            got = forward.learn(corpus, range(4), [("one", 4)], weights, tick=1)
            found = gradients(bank)
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    for path, gradient in want_gradients.items():
        assert relative(found[path], gradient) < 1e-4, path


@pytest.mark.parametrize(("name", "modules", "targets"), WITH_ATTENTION, ids=str)
def test_a_module_that_cannot_be_shared_out_among_the_parts_of_a_stream_is_refused_by_name(name, modules, targets):
    with Bank(tiny(name)) as bank:
        bank.add("one", spec(targets, modules_to_save=modules))
        with Forward(bank) as forward, pytest.raises(RouteError, match="one adapter at a time") as caught:
            forward.measure(random_corpus(LENGTHS), range(4), [("one", 2), (None, 2)])
    assert modules[0].rsplit(".", 1)[-1] in str(caught.value).split(":")[0]


def plain_losses(model, corpus, batches: list[np.ndarray], run: Run, part: str) -> list[float]:
    """The loop written out: one document after another, autograd, torch's AdamW; only the named module learns."""
    model.requires_grad_(False)
    parameters = list(model.get_submodule(part).requires_grad_(True).parameters())
    optimiser = torch.optim.AdamW(parameters, lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=0.0)
    losses = []
    for batch in batches:
        documents = [corpus.document(int(i)) for i in batch]
        total, count = torch.zeros(()), sum(int(mask.sum()) for _, mask in documents)
        for tokens, mask in documents:
            ids = torch.as_tensor(tokens.astype(np.int64))
            logits = model(input_ids=ids[None]).logits[0, :-1]
            each = F.cross_entropy(logits, ids[1:], reduction="none")
            total = total + each[torch.as_tensor(mask[1:])].sum()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.clip)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(total.detach()) / count)
    return losses


@pytest.mark.parametrize("part", ["model.norm", "lm_head", "model.layers.1.mlp"])
def test_training_a_module_whole_is_training_it_in_plain_torch(part):
    """The scale is so small that the low-rank part, which every adapter has, learns nothing."""
    corpus, run = random_corpus([8] * 12), Run(lr=1e-2, schedule="constant", warmup=0)
    model, plain = tiny("llama"), tiny("llama")
    base = copy.deepcopy(model.state_dict())
    told: list[dict] = []
    with Bank(model) as bank:
        bank.add("a", spec(("layers.0.self_attn.q_proj",), rank=1, alpha=1e-12, modules_to_save=(part,)))
        loop = Loop(batch_documents=3, max_steps=4)
        train(bank, {"a": run}, corpus, loop=loop, observe=told.append)
        copies = {p: t.detach().clone() for p, t in bank.named_parameters("a") if p.startswith(f"{part}.")}
    losses = [event["loss"] for event in told if event["kind"] == "step"]
    order = Order(corpus.lengths(), loop.seed, loop.batch_tokens, loop.batch_documents)
    want = plain_losses(plain, corpus, [order.step(step)[1] for step in range(4)], run, part)
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    for path, tensor in copies.items():
        learnt = plain.get_parameter(path).detach()
        assert relative(tensor - base[path], learnt - base[path]) < 1e-2, path
    assert all(torch.equal(tensor, base[path]) for path, tensor in model.state_dict().items())


@pytest.mark.parametrize("modules", [("lm_head", "norm"), ("embed_tokens",)], ids=str)
def test_what_was_trained_whole_is_saved_and_comes_back_in_rankwise_and_in_peft(tmp_path, modules):
    corpus, ids = pattern_corpus(40), torch.tensor([[5, 8, 11, 14, 17]])
    model = tiny("llama")
    clean = state_of(model)
    with Bank(model) as bank:
        bank.add("a", spec("all-linear", modules_to_save=modules))
        with held_folder(tmp_path / "run", resume=False) as folder:
            train(bank, {"a": Run(lr=1e-2)}, corpus, valid=corpus.subset(range(8)), loop=Loop(epochs=3), out=folder)
        assert all(not torch.equal(t, model.get_parameter(f"{p}.base.{n}")) for p, n, t in _copies(bank))
        bank.save("a", tmp_path / "adapter")
        with bank.use("a"), torch.no_grad():
            want = model(input_ids=ids).logits
        with torch.no_grad():
            assert relative(model(input_ids=ids).logits, want) > 0.05
    assert state_of(model) == clean
    with Bank(model) as bank, torch.no_grad():
        bank.load("again", tmp_path / "adapter")
        with bank.use("again"):
            assert torch.equal(model(input_ids=ids).logits, want)
    other = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert relative(other(input_ids=ids).logits, want) < 1e-5


def _copies(bank: Bank):
    for path, tensors in bank.adapter("a").modules.items():
        for name, tensor in tensors.items():
            yield path, name, tensor


def test_in_bfloat16_copies_learn_in_float32_and_speak_in_bfloat16():
    """A step of 1e-4 of a weight is lost in bfloat16; its sum over many steps is not."""
    corpus = pattern_corpus(60)
    model = tiny("llama", torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    with Bank(model) as bank:
        bank.add("a", spec("minimal", modules_to_save=("norm", "lm_head")))
        copies = {name: p for name, p in bank.named_parameters("a") if "norm" in name or "lm_head" in name}
        assert {p.dtype for p in copies.values()} == {torch.float32}
        train(bank, {"a": Run(lr=1e-4)}, corpus, loop=Loop(epochs=2, batch_tokens=100))
        moved = [float((p.detach() - before[name].float()).abs().max()) for name, p in copies.items()]
        assert all(0 < distance < 0.01 for distance in moved)
        with bank.use("a"):
            assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16
        found = evaluate(bank, ["a"], corpus)
        assert found.differences[0].high < 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
