"""A document in a packed, mixed stream equals the document alone, on every causal architecture: loss and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rankwise.engine import attention
from rankwise.engine.forward import Forward
from rankwise.errors import ModelError
from rankwise.surgery.bank import Bank
from tests.corpora import alike_corpus, random_corpus
from tests.grid import relative, spec, state_of, trained
from tests.models import ARCHITECTURES, CAUSAL, tiny

LENGTHS = [9, 2, 30, 17]
NAMES = ["one", None, "other", "one"]


def alone(bank: Bank, corpus, names, weights) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """The reference: transformers' own forward on one document at a time, torch's cross-entropy, autograd."""
    losses = []
    for i, name in enumerate(names):
        tokens, mask = corpus.document(i)
        with bank.use(name):
            logits = bank.model(input_ids=torch.tensor(tokens.astype(np.int64))[None]).logits[0, :-1]
        each = F.cross_entropy(logits.float(), torch.tensor(tokens[1:].astype(np.int64)), reduction="none")
        losses.append(each[torch.tensor(mask[1:])].sum())
    total = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
    total.backward()
    return np.array([float(loss.detach()) for loss in losses]), gradients(bank)


def gradients(bank: Bank) -> dict[str, torch.Tensor]:
    found = {}
    for name in bank.names:
        for path, parameter in bank.named_parameters(name):
            found[f"{name}/{path}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
    return found


def runs_of(names):
    return [(name, 1) for name in names]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_packed_equals_alone(name, checkpointing):
    model, corpus = tiny(name), random_corpus(LENGTHS)
    weights = np.array([0.5, 1.0, 0.1, 0.3])
    with Bank(model) as bank:
        trained(bank, "one", spec(ARCHITECTURES[name].targets), seed=1)
        trained(bank, "other", spec("all-linear", rank=2), seed=2)
        before = state_of(model)
        want, want_gradients = alone(bank, corpus, NAMES, weights)
        with Forward(bank, checkpointing=checkpointing) as forward:
            assert forward.layout == "packed", forward.reason
            got = forward.learn(corpus, range(4), runs_of(NAMES), weights, tick=1)
            got_gradients = gradients(bank)
            measured = forward.measure(corpus, range(4), runs_of(NAMES))
        assert state_of(model) == before
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    np.testing.assert_allclose(measured.documents, want, rtol=1e-5)
    for path, gradient in want_gradients.items():
        assert gradient.norm() > 0, path
        assert relative(got_gradients[path], gradient) < 1e-4, path


@pytest.mark.parametrize("name", CAUSAL)
def test_documents_that_begin_alike_equal_each_alone(name):
    """What they share is computed once; each adapter has its own."""
    names = ["one", "one", "one", "other", "other", None, None]
    lengths = [40, 41, 60, 45, 50, 30, 30]
    corpus = alike_corpus(lengths, [(0, 1, 39), (0, 2, 20), (0, 3, 39), (3, 4, 44), (0, 5, 20), (5, 6, 29)])
    model, weights = tiny(name), np.linspace(0.3, 1.0, 7)
    with Bank(model) as bank:
        trained(bank, "one", spec(ARCHITECTURES[name].targets), seed=1)
        trained(bank, "other", spec("all-linear", rank=2), seed=2)
        want, want_gradients = alone(bank, corpus, names, weights)
        with Forward(bank) as forward:
            assert forward.layout == "packed", forward.reason
            runs = [("one", 3), ("other", 2), (None, 2)]
            got = forward.learn(corpus, range(7), runs, weights, tick=1)
            got_gradients = gradients(bank)
            measured = forward.measure(corpus, range(7), runs)
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    np.testing.assert_allclose(measured.documents, want, rtol=1e-5)
    for path, gradient in want_gradients.items():
        assert relative(got_gradients[path], gradient) < 1e-4, path


def test_a_model_that_cannot_pack_goes_row_by_row(monkeypatch):
    model, corpus = tiny("llama"), random_corpus(LENGTHS)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda self: False)
    weights = np.ones(4)
    with Bank(model) as bank:
        trained(bank, "one", spec("all-linear"), seed=1)
        trained(bank, "other", spec(("lm_head", "q_proj")), seed=2)
        want, want_gradients = alone(bank, corpus, NAMES, weights)
        with Forward(bank) as forward:
            assert forward.layout == "rows"
            assert "attention interface" in forward.reason
            got = forward.learn(corpus, range(4), runs_of(NAMES), weights, tick=1)
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    for path, gradient in gradients(bank).items():
        assert relative(gradient, want_gradients[path]) < 1e-4, path


def test_attention_that_leaks_between_documents_is_found_out(monkeypatch):
    model = tiny("llama")
    with Bank(model) as bank:
        bank.add("a", spec())

        def leaking(q, k, v, spans, scale, window=0, softcap=0.0):
            whole = attention.Spans((0, len(q)))
            return attend(q, k, v, whole, scale, window, softcap)

        attend = attention.attend
        monkeypatch.setattr(attention, "attend", leaking)
        with Forward(bank) as forward:
            assert forward.layout == "rows"


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_bfloat16_on_compiled_kernels_stays_near_the_truth(name):
    model, truth = tiny(name, torch.bfloat16), tiny(name, torch.bfloat16).float()
    corpus, weights = random_corpus([40, 25, 60]), np.ones(3) / 50
    found = {}
    for which in (model, truth):
        with Bank(which) as bank:
            trained(bank, "a", spec("all-linear"), size=0.1)
            with Forward(bank) as forward:
                losses = forward.learn(corpus, range(3), [("a", 3)], weights, tick=1)
                found[which.dtype] = losses.documents, gradients(bank), forward.fused
    low, high = found[torch.bfloat16], found[torch.float32]
    np.testing.assert_allclose(low[0], high[0], rtol=0.02)
    for path in high[1]:
        assert relative(low[1][path], high[1][path]) < 0.1, path
    assert high[2] == 0


def test_nothing_but_causal_language_models():
    for name in ("bert", "unet"):
        with Bank(tiny(name)) as bank, pytest.raises(ModelError), Forward(bank):
            pass


def test_the_model_is_given_back_as_it_was_after_an_error():
    model = tiny("llama").train()
    with Bank(model) as bank:
        bank.add("a", spec("minimal"))
        before, own = state_of(model), model.config._attn_implementation
        with pytest.raises(RuntimeError, match="stop"), Forward(bank):
            raise RuntimeError("stop")
        assert state_of(model) == before
        assert model.config._attn_implementation == own
        assert all(module.training for module in model.modules())


def test_no_logits_of_a_whole_batch_ever_exist():
    model, corpus = tiny("llama"), random_corpus([200] * 4, supervised=0.9)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (97,):
                largest = max(largest, len(out))
            return out

    from rankwise.engine import head

    head.CHUNK_BYTES["cpu"], kept = 64 * 97 * 4, head.CHUNK_BYTES["cpu"]
    try:
        with Bank(model) as bank:
            bank.add("a", spec())
            with Forward(bank) as forward, Watch():
                forward.learn(corpus, range(4), [("a", 4)], np.ones(4), tick=0)
                forward.measure(corpus, range(4), [("a", 4)])
    finally:
        head.CHUNK_BYTES["cpu"] = kept
    assert 0 < largest <= 64


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ValueError])
def test_a_model_that_breaks_on_a_packed_stream_goes_row_by_row(monkeypatch, kind):
    def breaking(*_, **__):
        raise kind("one row is not enough\nfor me")

    model, corpus = tiny("llama"), random_corpus(LENGTHS)
    monkeypatch.setattr(attention, "attend", breaking)
    with Bank(model) as bank:
        trained(bank, "one", spec("all-linear"), seed=1)
        want, _ = alone(bank, corpus, ["one"] * 4, np.ones(4))
        with Forward(bank) as forward:
            assert (forward.layout, forward.reason) == (
                "rows",
                f"a packed stream ends in a {kind.__name__}: one row is not enough",
            )
            got = forward.learn(corpus, range(4), [("one", 4)], np.ones(4), tick=1)
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)


def test_a_model_that_is_its_own_base_is_asked_for_its_logits(monkeypatch):
    """Llama4ForCausalLM names a base that it does not have."""
    model, corpus = tiny("llama"), random_corpus(LENGTHS)
    monkeypatch.setattr(type(model), "base_model_prefix", "not_there")
    assert model.base_model is model
    with Bank(model) as bank:
        trained(bank, "one", spec("all-linear"), seed=1)
        want, _ = alone(bank, corpus, ["one"] * 4, np.ones(4))
        with Forward(bank) as forward:
            got = forward.learn(corpus, range(4), [("one", 4)], np.ones(4), tick=1)
            assert forward.layout == "packed", forward.reason
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_models_with_an_encoder_are_refused_in_plain_words(name):
    with Bank(tiny(name)) as bank, pytest.raises(ModelError, match="encoder beside its decoder"), Forward(bank):
        pass


def test_a_model_that_cannot_take_tokens_alone_is_refused_in_plain_words(monkeypatch):
    def forward(self, **inputs):
        raise ValueError("You have to specify pictures")

    model = tiny("llama")
    monkeypatch.setattr(type(model), "forward", forward)
    with Bank(model) as bank, pytest.raises(ModelError, match="specify pictures"), Forward(bank):
        pass
