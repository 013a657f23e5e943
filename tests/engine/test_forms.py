"""Every form and storage in a packed, mixed stream equals itself alone; and who computes the products of every task."""

import numpy as np
import pytest
import torch

from rankwise.engine.forward import Forward
from rankwise.engine.tasks.choose import task_for
from rankwise.frozen.coded import hold
from rankwise.kernels.library import native
from rankwise.surgery.bank import Bank
from rankwise.surgery.kinds import LinearKind
from rankwise.surgery.layer import AdaptedLayer
from tests.corpora import random_corpus, random_examples
from tests.engine.test_forward import LENGTHS, NAMES, alone, gradients, runs_of
from tests.grid import FORMS, RESIDUAL_FORMS, STORAGES, relative, spec, trained
from tests.models import TASK_MODELS, tiny


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("form", "start"), [*((f, "gaussian") for f in FORMS), *((f, "olora") for f in RESIDUAL_FORMS)]
)
def test_packed_equals_alone(name, storage, form, start):
    corpus, weights = random_corpus(LENGTHS), np.array([0.5, 1.0, 0.1, 0.3])
    with Bank(hold(tiny(name), storage)) as bank:
        trained(bank, "one", spec("all-linear", form=form, init=start, scaling="alpha/sqrt(r)"), seed=1, size=0.1)
        trained(bank, "other", spec("attention", form=form, rank=2), seed=2, size=0.1)
        want, want_gradients = alone(bank, corpus, NAMES, weights)
        with Forward(bank) as forward:
            assert forward.layout == "packed", forward.reason
            got = forward.learn(corpus, range(4), runs_of(NAMES), weights, tick=1)
            found = gradients(bank)
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    for path, gradient in want_gradients.items():
        assert gradient.norm() > 0, path
        assert relative(found[path], gradient) < 1e-4, path


def products_of(bank: Bank, examples) -> dict[str, str]:
    """Of every adapted linear layer with rows enough to pay: what computed its output when the engine trained it."""
    found = {}

    def see(layer, inputs, out):
        if isinstance(layer.kind, LinearKind) and inputs[0].shape[:-1].numel() >= 32:
            found[layer.path] = type(out.grad_fn).__name__

    layers = [module for module in bank.model.modules() if isinstance(module, AdaptedLayer)]
    with Forward(bank, task_for(examples)) as forward:
        hooks = [layer.register_forward_hook(see) for layer in layers]
        documents = len(examples)
        forward.learn(examples, range(documents), [("a", documents)], np.ones(documents), tick=1)
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("task", "name"), [("causal-lm", "llama"), ("causal-lm", "gpt2"), *TASK_MODELS])
def test_every_task_gets_the_compiled_product_in_bfloat16(task, name, dtype):
    """A picture's patches as a text's tokens."""
    causal = task == "causal-lm"
    examples = random_corpus([40, 25, 60]) if causal else random_examples(task)
    with Bank(tiny(name, dtype, task=None if causal else task)) as bank:
        trained(bank, "a", spec("all-linear"), size=0.1)
        found = products_of(bank, examples)
    compiled = dtype == torch.bfloat16 and native() is not None
    assert len(found) >= 4
    assert set(found.values()) == {"_CompiledProductBackward" if compiled else "_LowRankProductBackward"}
