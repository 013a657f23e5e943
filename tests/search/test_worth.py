"""What parts are worth, against transformers' own passes, one document at a time, and finite differences."""

import numpy as np
import pytest
import torch

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.parts import core_of
from rankwise.adapters.spec import LoraSpec
from rankwise.engine.forward import Forward
from rankwise.engine.tasks.choose import task_for
from rankwise.errors import SpecError, TrainingError
from rankwise.search.worth import fisher_roots, input_roots
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus, random_examples
from tests.engine.test_gradient import mean_loss
from tests.grid import spec, trained
from tests.models import tiny

CORPUS = random_corpus([12, 9, 20, 15])


def ignore(share):
    pass


def cores_of(bank):
    return {path: core_of(factors) for path, factors in bank.adapter("a").sites.items()}


def roots(bank, examples, micro_tokens=30):
    with Forward(bank, task_for(examples)) as forward:
        return input_roots(forward, "a", cores_of(bank), examples, micro_tokens, ignore)


def put_apart(bank):
    """The adapter `a` with its cores' gradients to be had, as `b`; its cores."""
    cores = cores_of(bank)
    bank.put("b", Adapter(LoraSpec(), {path: core.trainable() for path, core in cores.items()}))
    return cores


def fisher(bank, examples):
    cores = put_apart(bank)
    with Forward(bank, task_for(examples)) as forward:
        return cores, fisher_roots(forward, "b", cores, examples, ignore)


LINEAR = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc"), "mixtral": ("q_proj", "o_proj")}


@pytest.mark.parametrize("name", LINEAR)
def test_second_moments_are_those_of_every_token(name):
    with Bank(tiny(name)) as bank:
        trained(bank, "a", spec(targets=LINEAR[name]), size=0.05)
        found = roots(bank, CORPUS)
        seen = {path: [] for path in bank.adapter("a").sites}
        hooks = [
            bank.model.get_submodule(path).register_forward_pre_hook(
                lambda _, given, path=path: seen[path].append(given[0].reshape(-1, given[0].shape[-1]))
            )
            for path in seen
        ]
        with torch.no_grad(), bank.use("a"):
            for i in range(len(CORPUS)):
                bank.model(input_ids=torch.tensor(CORPUS.document(i)[0].astype(np.int64))[None])
        for hook in hooks:
            hook.remove()
        for path, core in cores_of(bank).items():
            shrunk = torch.cat(seen[path]).double() @ core.right
            want = shrunk.t() @ shrunk / len(CORPUS.tokens)
            torch.testing.assert_close(found[path] @ found[path].t(), want, rtol=1e-3, atol=1e-4 * float(want.max()))


def test_padding_is_not_counted():
    examples = random_examples("sequence-classification")
    with Bank(tiny("bert", task="sequence-classification")) as bank:
        trained(bank, "a", spec(targets=("query", "dense")), size=0.05)
        alone, together = roots(bank, examples, micro_tokens=1), roots(bank, examples, micro_tokens=1000)
    for path, root in alone.items():
        torch.testing.assert_close(root @ root.t(), together[path] @ together[path].t(), rtol=1e-3, atol=1e-5)


def test_sites_without_rows_of_inputs_are_listed():
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(targets=("q_proj", "embed_tokens")))
        with pytest.raises(SpecError, match=r"are none:\n  model.embed_tokens\n"):
            roots(bank, CORPUS)


def by_document(bank, cores, examples, name="llama"):
    """Gradients of every core by single documents, from transformers' own pass over changed weights, float64."""
    sites = bank.adapter("a").sites
    found = []
    for i in range(len(examples)):
        one = examples.subset([i])
        model = tiny(name, torch.float64)
        lying = {path: as_outputs_by_inputs(model.get_submodule(path)) for path in sites}
        with torch.no_grad():
            for path, factors in sites.items():
                lying[path] += factors.delta(torch.float64)
        (mean_loss(model, one) * int(one.supervised.sum())).backward()
        own = {path: as_outputs_by_inputs(model.get_submodule(path), grad=True) for path in sites}
        found.append({path: core.left.t() @ own[path] @ core.right for path, core in cores.items()})
    return found


def as_outputs_by_inputs(module, *, grad=False):
    weight = module.weight.grad if grad else module.weight.data
    return weight if isinstance(module, torch.nn.Linear) else weight.t()  # embeddings and Conv1D lie the other way


CORPORA = pytest.mark.parametrize("micro", [CORPUS, random_corpus([7, 7, 7])], ids=["ragged", "even"])


@CORPORA
@pytest.mark.parametrize(
    ("name", "targets", "rank"),
    [
        ("llama", ("q_proj", "down_proj"), 1),
        ("llama", ("q_proj", "down_proj"), 3),
        ("llama", ("embed_tokens", "k_proj"), 20),  # 16 outputs of k
        ("gpt2", ("c_attn", "wpe"), 3),  # wte is the head too
    ],
)
def test_fisher_roots_are_of_the_gradients_of_single_documents(micro, name, targets, rank):
    with Bank(tiny(name, torch.float64)) as bank:
        trained(bank, "a", spec(targets=targets, rank=rank), size=0.1)
        cores, found = fisher(bank, micro)
        gradients = by_document(bank, cores, micro, name)
    assert found.keys() == cores.keys()
    items = int(micro.supervised.sum())
    for path, (outputs, inputs) in found.items():
        every = torch.stack([one[path] for one in gradients])
        outgoing, incoming = (every @ every.mT).sum(0), (every.mT @ every).sum(0)
        for got, want in (
            (outputs @ outputs.t(), outgoing / outgoing.trace()),
            (inputs @ inputs.t(), incoming / (2 * items)),
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.max()))


@CORPORA
def test_of_rank_one_the_worth_is_the_second_order_term_of_the_loss(micro):
    """There both factors are one number, and their product is exact, whatever the gradients add up to."""
    with Bank(tiny("llama", torch.float64)) as bank:
        trained(bank, "a", spec(targets=("q_proj", "down_proj"), rank=1), size=0.1)
        cores, found = fisher(bank, micro)
        gradients = by_document(bank, cores, micro)
    items = int(micro.supervised.sum())
    for path, core in cores.items():
        squares = sum(float(one[path]) ** 2 for one in gradients)
        want = 0.5 * float(core.core) ** 2 * squares / items
        assert float(core.parts(*found[path]).weights) == pytest.approx(want, rel=1e-4)


def test_all_parts_together_are_worth_what_the_core_is_between_its_factors():
    """Σ weights = ½·tr(Cᵀ·L·C·M), whichever parts there are."""
    alone = CORPUS.subset([2])
    with Bank(tiny("llama", torch.float64)) as bank:
        trained(bank, "a", spec(targets=("q_proj",), rank=3), size=0.1)
        cores, found = fisher(bank, alone)
        (gradients,) = by_document(bank, cores, alone)
    for path, core in cores.items():
        g = gradients[path]
        want = 0.5 * (core.core.t() @ g @ g.t() @ core.core @ g.t() @ g).trace() / g.square().sum()
        got = core.parts(*found[path]).weights.double().sum() * int(alone.supervised.sum())
        assert float(got) == pytest.approx(float(want), rel=1e-3)


def test_dropout_that_the_adapter_was_trained_with_plays_no_part():
    found = []
    for dropout in (0.0, 0.5):
        with Bank(tiny("llama")) as bank:
            trained(bank, "a", spec(targets=("q_proj",), dropout=dropout), size=0.05)
            found.append(fisher(bank, CORPUS)[1])
    without, with_dropout = found
    for path, (outputs, inputs) in without.items():
        torch.testing.assert_close((outputs, inputs), with_dropout[path])


def test_of_what_the_loss_does_not_depend_on_nothing_is_known():
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(targets=("q_proj",)), size=0.05)
        first, *others = bank.adapter("a").sites
        with torch.no_grad():
            bank.model.get_submodule(first.replace("q_proj", "o_proj")).weight.zero_()
        _, found = fisher(bank, CORPUS)
    assert found.keys() == set(others)


def test_gradients_that_are_not_finite_are_told_by_document():
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(targets=("q_proj",)))
        cores = put_apart(bank)
        with Forward(bank) as forward:
            with torch.no_grad():
                bank.model.get_input_embeddings().weight[int(CORPUS.tokens[CORPUS.bounds[2]])] = torch.inf
            with pytest.raises(TrainingError, match=r"random\.jsonl:3"):
                fisher_roots(forward, "b", cores, CORPUS, ignore)
