"""What training says it will take, before the first step, held against what lies in memory."""

import pytest

from rankwise.frozen.load import load_base
from rankwise.jobs.plan import predicted_training
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.jobs.world import request


def predicted(world, bank, base, **settings):
    asked = request(world / "llama", world / "train.jsonl", world / "none", **settings)
    return predicted_training(asked, base, bank, CORPUS)


CORPUS = random_corpus([20, 30, 10, 25])


@pytest.mark.parametrize("storage", ["dense", "int8", "nf4"])
def test_the_weights_are_counted_as_they_are_held(world, storage):
    base = load_base(world / "llama", dtype="float32", storage=storage)
    held = [*base.model.parameters(), *(b for name, b in base.model.named_buffers() if "inv_freq" not in name)]
    with Bank(base.model) as bank:
        bank.add("a", request(world / "llama", world / "train.jsonl", world / "none").spec)
        found = predicted(world, bank, base, storage=storage)
    assert found.weights == pytest.approx(sum(tensor.nbytes for tensor in held), rel=5e-3)


def test_modules_that_are_trained_whole_and_the_best_that_is_kept_are_counted(world):
    base = load_base(world / "llama", dtype="float32")
    plain = request(world / "llama", world / "train.jsonl", world / "none").spec
    with Bank(base.model) as bank:
        bank.add("a", plain)
        alone, trained = predicted(world, bank, base), bank.adapter("a").parameter_count()
    assert (alone.gradients, alone.best) == (4 * trained, 4 * trained)
    with Bank(base.model) as bank:
        bank.add("a", plain.model_copy(update={"modules_to_save": ("lm_head",)}))
        whole = predicted(world, bank, base)
        head = base.model.get_output_embeddings().weight.numel()
    for part, each in {"adapters": 4, "gradients": 4, "optimiser": 8, "best": 4}.items():
        assert getattr(whole, part) == getattr(alone, part) + each * head, part


def test_training_all_weights_keeps_a_copy_of_its_best(world):
    base = load_base(world / "llama", dtype="float32")
    count = sum(parameter.numel() for parameter in base.model.parameters())
    with Bank(base.model) as bank:
        found = predicted(world, bank, base, form="full")
    assert (found.gradients, found.best) == (4 * count, 4 * count)
