"""Windows and chunks that a model keeps in its masks alone: packed right, or not packed."""

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from rankwise.engine import attention
from rankwise.engine.attention import UnpackableError, attending
from rankwise.engine.forward import Forward
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.engine.test_forward import alone
from tests.grid import spec, trained
from tests.models import LLAMA

SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 12}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
CHUNKED = {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8}
WINDOWED = {
    "qwen2-moe": (hf.Qwen2MoeConfig, {**LLAMA, **MOE, **SLIDING, "use_sliding_window": True}, "packed"),
    "phimoe": (hf.PhimoeConfig, {**LLAMA, "num_local_experts": 3, "sliding_window": 12}, "packed"),
    "mistral": (hf.MistralConfig, {**LLAMA, "sliding_window": 12}, "packed"),
    "llama4": (hf.Llama4TextConfig, {**LLAMA, **CHUNKED, "layer_types": ["chunked_attention"] * 2}, "rows"),
}


def windowed(name: str) -> nn.Module:
    config, settings, _ = WINDOWED[name]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", WINDOWED)
def test_documents_longer_than_the_window_come_out_as_they_do_alone(name):
    corpus, weights = random_corpus([40, 40, 25]), np.array([1.0, 0.3, 0.5])
    with Bank(windowed(name)) as bank:
        trained(bank, "a", spec(("q_proj", "o_proj")), size=0.1)
        want, _ = alone(bank, corpus, ["a"] * 3, weights)
        with Forward(bank) as forward:
            got = forward.learn(corpus, range(3), [("a", 3)], weights, tick=1)
            assert forward.layout == WINDOWED[name][2], forward.reason
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)


def test_masks_that_packed_attention_cannot_keep_are_refused():
    chunked = hf.Llama4TextConfig(attention_chunk_size=8)
    with pytest.raises(UnpackableError, match="chunks of 8"):
        attention.window_alone(local_size=8, config=chunked)
    with pytest.raises(UnpackableError, match="a mask of its own"):
        attention.window_alone(use_vmap=True)
    assert attention.window_alone(local_size=None) is None


def test_a_model_is_given_back_its_own_attention():
    model = windowed("qwen2-moe")
    own = model.config._attn_implementation
    with attending(model):
        assert model.config._attn_implementation == attention.NAME
    assert model.config._attn_implementation == own
