"""What parts are worth, against transformers' own passes, one document at a time, and finite differences."""

import numpy as np
import pytest
import torch

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.parts import parts_of
from rankwise.adapters.spec import LoraSpec
from rankwise.engine.forward import Forward
from rankwise.engine.tasks.choose import task_for
from rankwise.errors import SpecError, TrainingError
from rankwise.search.worth import fisher_worth, input_roots
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus, random_examples
from tests.engine.test_gradient import mean_loss
from tests.grid import spec, trained
from tests.models import tiny

CORPUS = random_corpus([12, 9, 20, 15])


def ignore(share):
    pass


def roots(bank, examples, micro_tokens=30):
    with Forward(bank, task_for(examples)) as forward:
        return input_roots(forward, "a", bank.adapter("a").sites, examples, micro_tokens, ignore)


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
        for path, factors in bank.adapter("a").sites.items():
            shrunk = torch.cat(seen[path]).double() @ factors.A.detach().double().t()
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


def switched(bank):
    """The adapter `a` taken apart into one that can be switched, as `b`."""
    parts = {path: parts_of(factors) for path, factors in bank.adapter("a").sites.items()}
    bank.put("b", Adapter(LoraSpec(form="adalora"), {path: own.switchable() for path, own in parts.items()}))


@pytest.mark.parametrize("micro", [CORPUS, random_corpus([7, 7, 7])], ids=["ragged", "even"])
def test_fisher_is_the_second_order_term_of_the_loss_along_each_part(micro):
    """Slopes by central differences in float64, document by document."""
    with Bank(tiny("llama", torch.float64)) as bank:
        trained(bank, "a", spec(targets=("q_proj", "down_proj"), rank=2), size=0.1)
        switched(bank)
        with Forward(bank) as forward:
            found = fisher_worth(forward, "b", micro, ignore)
        items = int(micro.supervised.sum())
        step = 1e-2
        for path, factors in bank.adapter("b").sites.items():
            for k in range(factors.rank):
                slopes = []
                with torch.no_grad(), bank.use("b"):
                    value = float(factors.lam[k])
                    for i in range(len(micro)):
                        one = micro.subset([i])
                        ends = []
                        for sign in (1, -1):
                            factors.lam[k] = value + sign * step
                            ends.append(float(mean_loss(bank.model, one)) * int(one.supervised.sum()))
                        slopes.append((ends[0] - ends[1]) / (2 * step))
                    factors.lam[k] = value
                slopes = np.array(slopes)
                want = 0.5 * value**2 * (slopes**2).sum() / items  # whatever its slopes add up to
                assert float(found[path][k]) == pytest.approx(want, rel=1e-3)


def test_gradients_that_are_not_finite_are_told_by_document():
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(targets=("q_proj",)))
        switched(bank)
        with Forward(bank) as forward:
            with torch.no_grad():
                bank.model.get_input_embeddings().weight[int(CORPUS.tokens[CORPUS.bounds[2]])] = torch.inf
            with pytest.raises(TrainingError, match=r"random\.jsonl:3"):
                fisher_worth(forward, "b", CORPUS, ignore)
