"""Gradient checkpointing: the same losses, gradients and weights for less memory.

That gradients agree with those of documents alone, with and without it, is in test_forward.py.
"""

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from rankwise.engine.forward import Forward
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.errors import RankwiseWarning
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import spec, trained
from tests.models import tiny


def learn(name: str, dtype: torch.dtype, checkpointing: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    told: list[dict] = []
    with Bank(tiny(name, dtype)) as bank:
        bank.add("a", spec("all-linear", dropout=0.3))
        loop = Loop(batch_tokens=60, micro_tokens=30, epochs=2, checkpointing=checkpointing)
        train(bank, {"a": Run(lr=5e-3)}, random_corpus([7, 9, 5, 12, 20] * 2), loop=loop, observe=told.append)
        tensors = {path: tensor.detach().clone() for path, tensor in bank.named_parameters("a")}
    return tensors, [event["loss"] for event in told if event["kind"] == "step"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_run_ends_with_the_same_bits_dropout_included(name, dtype):
    """The second computation of a block draws the same dropout masks and takes the same kernels as the first."""
    plain, saving = learn(name, dtype, False), learn(name, dtype, True)
    assert saving[1] == plain[1]
    assert [path for path in plain[0] if not torch.equal(saving[0][path], plain[0][path])] == []


def kept_bytes(checkpointing: bool, dropout: float) -> int:
    """What the forward pass keeps for the backward pass, the model's own parameters not counted."""
    kept: dict[int, int] = {}
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec("all-linear", dropout=dropout))
        own = {tensor.untyped_storage().data_ptr() for tensor in bank.model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in own:
                kept[place] = tensor.untyped_storage().nbytes()
            return tensor

        corpus = random_corpus([100] * 4)
        with Forward(bank, checkpointing=checkpointing) as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
            forward.learn(corpus, range(4), [("a", 4)], np.ones(4), tick=1)
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_keeps_a_fraction_of_the_activations(dropout):
    assert kept_bytes(True, dropout) < 0.25 * kept_bytes(False, dropout)


@pytest.mark.parametrize("targets", [("lm_head", "q_proj"), ("lm_head", "embed_tokens", "down_proj")], ids=str)
def test_an_adapted_head_does_not_move_the_dropout_of_the_blocks(targets):
    """The head's loss is gathered after the blocks have run, and before they are computed again."""
    found = []
    for checkpointing in (False, True):
        corpus = random_corpus([9, 14, 6])
        with Bank(tiny("llama")) as bank:
            trained(bank, "a", spec(targets, dropout=0.5))
            with Forward(bank, checkpointing=checkpointing) as forward:
                forward.learn(corpus, range(3), [("a", 3)], np.ones(3), tick=7)
            found.append({path: p.grad.clone() for path, p in bank.named_parameters("a")})
    plain, saving = found
    assert [path for path in plain if not torch.equal(saving[path], plain[path])] == []


def test_a_head_draws_the_dropout_of_its_pass():
    seen = []
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(("lm_head",), dropout=0.5))
        head = bank.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda *_: seen.append(bank.router.tick))
        with Forward(bank) as forward:
            seen.clear()
            forward.learn(random_corpus([9, 14]), range(2), [("a", 2)], np.ones(2), tick=7)
    assert set(seen) == {7}


def test_a_model_without_blocks_to_compute_again_says_so(monkeypatch):
    from rankwise.engine import forward as module

    monkeypatch.setattr(module, "GradientCheckpointingLayer", torch.nn.Bilinear)
    warned = pytest.warns(RankwiseWarning, match="checkpointing has no effect")
    with Bank(tiny("llama")) as bank, warned, Forward(bank, checkpointing=True):
        pass
