"""All weights trained, held against plain torch: autograd through the model itself, and its AdamW."""

import copy
import os
import signal

import numpy as np
import pytest
import torch

from rankwise.adapters.spec import LoraSpec
from rankwise.data.order import Order
from rankwise.engine.evaluate import evaluate, measured
from rankwise.engine.folder import held_folder
from rankwise.engine.forward import Forward
from rankwise.engine.interrupt import Interrupted
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.engine.tasks.choose import task_for
from rankwise.engine.weights import Weights
from rankwise.errors import SpecError
from rankwise.frozen.coded import hold
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus, random_corpus, random_examples
from tests.grid import relative
from tests.models import tiny

# The gradient of GPT-2's bias of the keys is nought but for rounding, which AdamW's usual epsilon would step by.
RUN = Run(lr=5e-3, weight_decay=0.1, eps=1e-4)
MODELS = {"masked-lm": "roberta", "seq2seq": "t5", "sequence-classification": "bert", "image-classification": "vit"}
CORPUS = random_corpus([7, 9, 5, 12, 3, 20, 8, 11] * 2)
LOOP = Loop(batch_tokens=40, max_steps=4, micro_tokens=24)


def plainly(model, corpus, loop, run):
    """The same steps by torch alone, document by document through the model's own forward pass."""
    weights = list(model.parameters())
    optimiser = torch.optim.AdamW(weights, lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay)
    order = Order(corpus.lengths(), loop.seed, loop.batch_tokens, loop.batch_documents)
    for step in range(loop.max_steps):
        _, documents = order.step(step)
        count = sum(int(corpus.document(i)[1][1:].sum()) for i in documents)
        for i in documents:
            tokens, mask = (torch.as_tensor(array).long() for array in corpus.document(i))
            logits = model(input_ids=tokens[None]).logits[0, :-1].double()
            each = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            ((each * mask[1:]).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(weights, run.clip)
        for group in optimiser.param_groups:
            group["lr"] = run.lr_at(step, loop.max_steps)
        optimiser.step()
        optimiser.zero_grad()


def learnt(model, corpus=CORPUS, run=RUN, loop=LOOP, **settings):
    with Bank(model) as bank:
        return train(bank, {None: run}, corpus, loop=loop, **settings)[None]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_plain_torch(name, dtype):
    ours = tiny(name, dtype)
    theirs, before = copy.deepcopy(ours).eval(), copy.deepcopy(ours)
    outcome = learnt(ours)
    plainly(theirs, CORPUS, LOOP, RUN)
    assert outcome.steps == 4
    start = dict(before.named_parameters())
    for path, weight in theirs.named_parameters():
        moved, wanted = ours.get_parameter(path) - start[path], weight - start[path]
        assert relative(moved, wanted) < 2e-3, path
        assert wanted.norm() > 0, path


def gradients(model, task, examples):
    """By torch alone, document by document."""
    own, count = task_for(examples)(model), examples.supervised_counts().sum()
    for i in range(len(examples)):
        batch = own.rows(examples, [i])
        inputs = {name: torch.as_tensor(array) for name, array in batch.inputs.items()}
        inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        logits = model(**inputs, **own.named).logits.flatten(0, -2)[torch.as_tensor(batch.sources)]
        targets = torch.as_tensor(batch.targets).long()
        (torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / count).backward()
    return {name: weight.grad.float() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", MODELS)
def test_gradients_of_every_task_are_those_of_its_own_logits(task, dtype):
    """In bfloat16 as near to the exact ones as torch's own are."""
    examples, model = random_examples(task), tiny(MODELS[task], dtype, task=task)
    plain = gradients(copy.deepcopy(model), task, examples)
    exact = gradients(copy.deepcopy(model).float(), task, examples)
    weights, count = Weights(model), len(examples)
    with Bank(model) as bank, Forward(bank, task_for(examples)) as forward:
        each = np.full(count, 1 / examples.supervised_counts().sum())
        forward.learn(examples, range(count), [(None, count)], each, 0)
    found = {name: master.grad for name, master in weights.masters.items() if master.grad is not None}
    assert found.keys() == exact.keys()
    total = sum(grad.square().sum() for grad in exact.values()).sqrt()
    for name, grad in exact.items():
        assert found[name].dtype == torch.float32
        rounding = 1.5 * (plain[name] - grad).norm() + (1e-2 * total if dtype == torch.bfloat16 else 1e-5 * total)
        assert (found[name] - grad).norm() < rounding, name
    weights.close()
    assert all(weight.grad is None for weight in model.parameters())


def test_shared_weights_are_counted_once():
    model = tiny("llama-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = Weights(model).masters
    assert "lm_head.weight" not in names
    assert sum(weight.numel() for weight in names.values()) == sum(w.numel() for w in model.parameters())


def test_steps_too_small_for_bfloat16_are_not_lost():
    """At a rate of a thousandth of what bfloat16 tells apart, no single step would move a weight."""
    run = Run(lr=2e-5, schedule="constant", warmup=0.0)
    loop = Loop(batch_tokens=40, max_steps=60)
    ours, alone = tiny("llama", torch.bfloat16), tiny("llama", torch.bfloat16)
    start = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    learnt(ours, pattern_corpus(60), run, loop)
    optimiser = torch.optim.AdamW(alone.parameters(), lr=run.lr, weight_decay=0.0)
    for weight in alone.parameters():
        weight.grad = torch.ones_like(weight)  # AdamW moves by its rate, whatever the gradient's size
    for _ in range(loop.max_steps):
        optimiser.step()
    name = "model.layers.0.mlp.up_proj.weight"
    large = start[name].abs() > 0.05  # a 256th of these is more than nine steps
    assert torch.equal(alone.get_parameter(name)[large], start[name][large])
    assert ours.get_parameter(name).dtype == torch.bfloat16
    assert (ours.get_parameter(name)[large] != start[name][large]).float().mean() > 0.2


def test_bfloat16_steps_follow_those_in_float32():
    narrow, wide = tiny("llama", torch.bfloat16), tiny("llama", torch.bfloat16).float()
    start = dict(copy.deepcopy(wide).named_parameters())
    for model in (narrow, wide):
        learnt(model, run=Run(lr=2e-2))
    moved = torch.cat([(wide.get_parameter(n) - w).flatten() for n, w in start.items()])
    found = torch.cat([(narrow.get_parameter(n).float() - w).flatten() for n, w in start.items()])
    assert torch.nn.functional.cosine_similarity(found, moved, dim=0) > 0.98


# ── in the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path, dtype):
    corpus, valid = pattern_corpus(60), pattern_corpus(8, seed=1)
    loop = Loop(batch_tokens=60, max_steps=6, evaluate_every=2)

    def stop(event):
        if event["kind"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def trained(out, resume=False, **settings):
        model = tiny("llama", dtype)
        with held_folder(out, resume=resume) as folder:
            outcome = learnt(model, corpus, Run(lr=2e-3), loop, valid=valid, out=folder, resume=resume, **settings)
        return model.state_dict(), outcome

    whole = trained(tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(tmp_path / "cut", observe=stop)
    resumed = trained(tmp_path / "cut", resume=True)
    assert resumed[1] == whole[1]
    assert all(torch.equal(resumed[0][name], tensor) for name, tensor in whole[0].items())


def test_the_best_weights_are_kept():
    """The rate is absurd after the first evaluations: the last weights are not the best."""
    valid, told, model = pattern_corpus(8, seed=1), [], tiny("llama")
    loop = Loop(batch_tokens=60, max_steps=20, evaluate_every=1)
    outcome = learnt(model, pattern_corpus(90), Run(lr=0.1), loop, valid=valid, observe=told.append)
    looks = {event["step"]: event["loss"] for event in told if event["kind"] == "evaluation" and event["step"]}
    assert {event["adapter"] for event in told if "adapter" in event} == {"full"}
    with Bank(model) as bank:
        losses, _ = measured(bank, [None], valid)
    found = losses.sum() / valid.supervised_counts().sum()
    assert outcome.best_loss == min(looks.values()) == looks[outcome.best_step]
    assert found == pytest.approx(outcome.best_loss, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_nothing_but_the_weights_is_changed(checkpointing):
    model = tiny("llama-tied", torch.bfloat16)
    modules, flags = dict(model.named_modules()), {name: w.requires_grad for name, w in model.named_parameters()}
    names = dict(model.named_parameters())
    with Bank(model) as bank:
        before = bank.base_fingerprint
        train(bank, {None: RUN}, CORPUS, loop=Loop(batch_tokens=40, max_steps=2, checkpointing=checkpointing))
        assert bank.base_fingerprint != before
        assert bank.base_fingerprint == Bank(copy.deepcopy(model)).base_fingerprint
        bank.add("a", LoraSpec(rank=2))
        assert len(evaluate(bank, ["a"], CORPUS).differences) == 1
    assert dict(model.named_modules()) == modules
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert all(dict(model.named_parameters())[name] is weight for name, weight in names.items())
    assert all(weight.grad is None and not weight._post_accumulate_grad_hooks for weight in names.values())


def test_weights_that_a_model_holds_fixed_stay_so():
    model = tiny("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    learnt(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(model.lm_head.weight, head)


def test_a_weight_that_no_gradient_reaches_stays_as_it_is_and_is_named():
    model, told = tiny("llama"), []
    model.model.unused = torch.nn.Parameter(torch.ones(3))
    learnt(model, observe=told.append)
    events = [event for event in told if event["kind"] == "event"]
    assert [(event["what"], event["weights"]) for event in events] == [
        ("weights that no gradient reaches", ["model.unused"])
    ]
    assert torch.equal(model.model.unused, torch.ones(3))


def test_what_cannot_be_is_refused():
    model = tiny("llama")
    with Bank(model) as bank:
        with pytest.raises(SpecError, match="lr_ratio"):
            train(bank, {None: Run(lr_ratio=4)}, CORPUS)
        bank.add("a", LoraSpec(rank=2))
        for runs in ({None: RUN}, {None: RUN, "a": RUN}):
            with pytest.raises(SpecError, match="by itself"):
                train(bank, runs, CORPUS)
    model.requires_grad_(False)
    with Bank(model) as bank, pytest.raises(SpecError, match="every weight of the model is frozen"):
        train(bank, {None: RUN}, CORPUS)
    with Bank(tiny("llama", torch.float16)) as bank, pytest.raises(SpecError, match="float16"):
        train(bank, {None: RUN}, CORPUS)
    with Bank(hold(tiny("llama", torch.bfloat16), "nf4")) as bank, pytest.raises(SpecError, match="nf4 is not trained"):
        train(bank, {None: RUN}, CORPUS)
