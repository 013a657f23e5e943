"""The stand-in for a modelling file's rotary function: where it is put, what it refuses, and that it goes again."""

import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from rankwise.engine import blocks
from rankwise.engine.blocks import fused_blocks
from rankwise.engine.forward import Forward
from rankwise.kernels.library import native
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import spec, trained
from tests.models import CAUSAL, LLAMA, tiny

compiled = pytest.mark.skipif(native() is None, reason="no compiled kernels on this machine")


def home_of(model: nn.Module):
    return sys.modules[type(model).__module__]


def function_of(model: nn.Module):
    return home_of(model).apply_rotary_pos_emb


def replaced(model: nn.Module) -> bool:
    """Whether the function is another within `fused_blocks`, and the same as before after it."""
    before = function_of(model)
    with fused_blocks(model):
        within = function_of(model)
    assert function_of(model) is before
    return within is not before


def from_config(config: hf.PreTrainedConfig) -> nn.Module:
    return hf.AutoModelForCausalLM.from_config(config).bfloat16()


def inputs(width: int = 16, share: int = 1):
    q, k = torch.randn(2, 9, 4, width).transpose(1, 2), torch.randn(2, 9, 2, width).transpose(1, 2)
    cos, sin = torch.randn(2, 2, 9, width // share)
    return [x.bfloat16() for x in (q, k, cos, sin)]


@compiled
@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in ("gpt2", "opt")])
def test_recognised(name):
    assert replaced(tiny(name, torch.bfloat16))


@pytest.mark.parametrize(
    "config",
    [
        hf.CohereConfig(**LLAMA),  # pairs (0, 1), (2, 3), …
        hf.GlmConfig(**LLAMA, head_dim=8),  # such pairs of one half
        hf.NanoChatConfig(**LLAMA),  # turns the other way
        hf.GPTJConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),  # one tensor at a time
        hf.GptOssConfig(**LLAMA, head_dim=8, num_local_experts=2),  # cosines half as wide
    ],
    ids=lambda config: config.model_type,
)
def test_refused(config):
    assert not replaced(from_config(config))


def test_models_without_such_a_function_and_other_number_formats_are_left_alone():
    with fused_blocks(tiny("gpt2", torch.bfloat16)):
        assert not hasattr(home_of(tiny("gpt2")), "apply_rotary_pos_emb")
    assert not replaced(tiny("llama"))


@compiled
def test_what_the_kernel_does_not_take_goes_to_the_original():
    model = tiny("phi3", torch.bfloat16)
    original, calls = function_of(model), []
    q, k, cos, sin = inputs()
    partial = inputs(share=2)
    with fused_blocks(model):
        stand_in = function_of(model)
        stand_in.original = lambda *args, **named: calls.append(args) or original(*args, **named)
        near = zip(stand_in(q, k, cos, sin), original(q, k, cos, sin), strict=True)
        assert all((a - b).norm() <= 8e-3 * b.norm() for a, b in near)
        assert not calls
        for args, named in [
            ((q.float(), k.float(), cos.float(), sin.float()), {}),
            (partial, {}),
            ((q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2), {}),
            ((q.transpose(1, 2), k.transpose(1, 2), cos, sin), {"unsqueeze_dim": 2}),
            ((q, k), {"cos": cos, "sin": sin}),
        ]:
            for got, want in zip(stand_in(*args, **named), original(*args, **named), strict=True):
                assert torch.equal(got, want)
        assert len(calls) == 5
        stand_in.original = original
    assert function_of(model) is original


@compiled
@pytest.mark.parametrize("first", [0, 1], ids=["first closes first", "last closes first"])
def test_two_engines_in_one_family(first):
    models = [tiny("llama", torch.bfloat16), tiny("llama-tied", torch.bfloat16)]
    original = function_of(models[0])
    holds = [ExitStack(), ExitStack()]
    for model, hold in zip(models, holds, strict=True):
        hold.enter_context(fused_blocks(model))
        assert function_of(model).original is original
    holds[first].close()
    assert function_of(models[0]).original is original
    holds[1 - first].close()
    assert function_of(models[0]) is original
    assert replaced(models[0])


@compiled
def test_a_file_that_took_the_function_over_from_another_gets_the_original(monkeypatch):
    llama, mistral = tiny("llama", torch.bfloat16), tiny("mistral", torch.bfloat16)
    original = function_of(llama)
    with ExitStack() as late:
        with fused_blocks(llama):
            monkeypatch.setattr(home_of(mistral), "apply_rotary_pos_emb", function_of(llama))
            late.enter_context(fused_blocks(mistral))
        assert function_of(llama) is original
    assert function_of(mistral) is original


def test_given_back_after_an_error():
    model = tiny("llama", torch.bfloat16)
    original = function_of(model)
    with Bank(model) as bank, pytest.raises(RuntimeError, match="stop"), Forward(bank):
        raise RuntimeError("stop")
    assert function_of(model) is original


@compiled
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_through_the_kernel(monkeypatch, checkpointing):
    seen, rotated = [], blocks.rotated
    monkeypatch.setattr(blocks, "rotated", lambda x, cos, sin: seen.append(x) or rotated(x, cos, sin))
    with Bank(tiny("llama", torch.bfloat16)) as bank:
        trained(bank, "a", spec("all-linear"))
        with Forward(bank, checkpointing=checkpointing) as forward:
            seen.clear()
            forward.learn(random_corpus([40, 25]), range(2), [("a", 2)], np.ones(2), tick=1)
    layers = 2
    assert len(seen) == 2 * layers * (1 + checkpointing)
