"""Every task: what goes through the engine is what transformers gives for each document alone, by its own loss."""

import numpy as np
import pytest
import torch

from rankwise.data.laid import Masked, Pairs
from rankwise.data.pictures import Pictures
from rankwise.engine import attention
from rankwise.engine.attention import Rows, UnpackableError
from rankwise.engine.forward import Forward
from rankwise.engine.outlet import BeforeHead, OfBase, Outlet
from rankwise.engine.tasks.choose import task_for, task_named
from rankwise.errors import ModelError
from rankwise.kernels.library import native
from rankwise.surgery.bank import Bank
from rankwise.tasks import TASKS as NAMED
from tests.corpora import random_corpus, random_examples, random_labelled
from tests.engine.test_forward import gradients, runs_of
from tests.grid import relative, spec, state_of, trained
from tests.models import TASK_MODELS, TASKS, tiny

NAMES = ["one", None, "other", "one", "other", "one"]
WHOLE = {"bert": "classifier", "roberta": "classifier", "distilbert": "classifier", "albert": "classifier"}
WHOLE |= {"llama": "score", "gpt2": "score", "vit": "classifier"}


def call(examples, i: int) -> dict[str, torch.Tensor]:
    """A document as one calls transformers' models, with labels."""
    if isinstance(examples, Pictures):
        return {"pixel_values": torch.tensor(examples.floats([i])), "labels": torch.tensor(examples.labels[[i]])}
    if isinstance(examples, Pairs):
        source, target = (torch.tensor(part.astype(np.int64))[None] for part in examples.document(i))
        return {"input_ids": source, "labels": target}
    if isinstance(examples, Masked):
        shown, places, wanted = examples.document(i)
        labels = np.full(len(shown), -100)
        labels[places] = wanted
        return {"input_ids": torch.tensor(shown)[None], "labels": torch.tensor(labels)[None]}
    tokens, second = examples.document(i)
    told = {"token_type_ids": torch.tensor(second.astype(np.int64))[None]} if examples.paired else {}
    labels = torch.tensor(examples.labels[[i]])
    return {"input_ids": torch.tensor(tokens.astype(np.int64))[None], "labels": labels, **told}


def alone(bank: Bank, examples, names, weights) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """The reference: one document at a time, transformers' own loss, autograd."""
    losses = []
    for i, name in enumerate(names):
        with bank.use(name):
            mean = bank.model(**call(examples, i)).loss
        losses.append(mean * int(examples.supervised_counts()[i]))
    total = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
    total.backward()
    return np.array([float(loss.detach()) for loss in losses]), gradients(bank)


def filled(bank: Bank, task: str, name: str) -> None:
    """Two adapters; where there are classes, each with an output layer of its own."""
    whole = (WHOLE[name],) if "classification" in task else ()
    trained(bank, "one", spec(TASKS[task][name][1], modules_to_save=whole), seed=1)
    trained(bank, "other", spec("attention", rank=2, modules_to_save=whole), seed=2)


LAYOUTS = {("masked-lm", name): "packed" for name in TASKS["masked-lm"]}


@pytest.mark.parametrize(
    ("task", "name", "checkpointing"),
    [(*case, again) for case in TASK_MODELS for again in (False, True) if not (again and case[1] == "albert")],
)  # ALBERT's one block has no switch of transformers' to be computed again
def test_routed_equals_alone(task, name, checkpointing):
    model, examples = tiny(name, task=task), random_examples(task)
    weights = np.array([0.5, 1.0, 0.1, 0.3, 0.7, 0.2])
    with Bank(model) as bank:
        filled(bank, task, name)
        before = state_of(model)
        want, want_gradients = alone(bank, examples, NAMES, weights)
        with Forward(bank, task_for(examples), checkpointing=checkpointing) as forward:
            assert forward.layout == LAYOUTS.get((task, name), "rows"), forward.reason
            got = forward.learn(examples, range(6), runs_of(NAMES), weights, tick=1)
            got_gradients = gradients(bank)
            measured = forward.measure(examples, range(6), runs_of(NAMES))
        assert state_of(model) == before
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    np.testing.assert_allclose(measured.documents, want, rtol=1e-5)
    for path, gradient in want_gradients.items():
        assert gradient.norm() > 0, path
        assert relative(got_gradients[path], gradient) < 1e-4, path


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_pairs_of_texts_are_told_apart(name):
    model, examples = tiny(name, task="sequence-classification"), random_labelled([9, 4, 30], paired=True)
    with Bank(model) as bank:
        filled(bank, "sequence-classification", name)
        want, _ = alone(bank, examples, ["one"] * 3, np.ones(3))
        with Forward(bank, task_for(examples)) as forward:
            got = forward.measure(examples, range(3), [("one", 3)])
            other = forward.measure(random_labelled([9, 4, 30]), range(3), [("one", 3)])
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    assert not np.allclose(other.documents, want, rtol=1e-3)


def test_the_class_that_is_said_is_the_likeliest():
    model, examples = tiny("bert", task="sequence-classification"), random_examples("sequence-classification")
    with Bank(model) as bank:
        filled(bank, "sequence-classification", "bert")
        want = []
        for i, name in enumerate(NAMES):
            with bank.use(name), torch.no_grad():
                want.append(int(model(**call(examples, i)).logits.argmax()))
        with Forward(bank, task_for(examples)) as forward:
            assert forward.measure(examples, range(6), runs_of(NAMES)).predicted.tolist() == want
    assert len(set(want)) > 1, "nothing is told apart"


# ── which way is taken ───────────────────────────────────────────────────────────────────────────────────────────────

OUTLETS = {("seq2seq", "bart"): OfBase, "masked-lm": BeforeHead, "seq2seq": BeforeHead}


@pytest.mark.parametrize(("task", "name"), TASK_MODELS)
def test_the_output_layer_is_run_on_judged_items_alone(task, name):
    """Through the layer's own place where the model does nothing after it; BART adds a bias, here of zeros."""
    with Bank(tiny(name, task=task)) as bank, Forward(bank, task_named(task)) as forward:
        assert type(forward._outlet) is OUTLETS.get((task, name), OUTLETS.get(task, Outlet))


def test_a_model_that_does_more_after_its_output_layer_is_asked_for_its_logits():
    """BART's bias, when there is one, is not the output layer's."""
    model, examples = tiny("bart", task="seq2seq"), random_examples("seq2seq")
    model.final_logits_bias.normal_()
    with Bank(model) as bank:
        filled(bank, "seq2seq", "bart")
        want, _ = alone(bank, examples, ["one"] * 6, np.ones(6))
        with Forward(bank, task_for(examples)) as forward:
            assert type(forward._outlet) is Outlet
            got = forward.learn(examples, range(6), [("one", 6)], np.ones(6), tick=1)
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_an_adapter_that_trains_what_holds_the_output_layer_has_its_own(name):
    """Then nothing may stand in the layer's place: each adapter has another one."""
    whole = {"bert": "cls", "distilbert": "vocab_projector"}[name]
    model, examples = tiny(name, task="masked-lm"), random_examples("masked-lm")
    with Bank(model) as bank:
        trained(bank, "one", spec("minimal", modules_to_save=(whole,)), seed=1)
        trained(bank, "other", spec("minimal"), seed=2)
        names = ["one", "other", None, "one", "one", "other"]
        want, want_gradients = alone(bank, examples, names, np.ones(6))
        with Forward(bank, task_for(examples)) as forward:
            got = forward.learn(examples, range(6), runs_of(names), np.ones(6), tick=1)
            assert (type(forward._outlet) is Outlet) == (name == "bert")
    np.testing.assert_allclose(got.documents, want, rtol=1e-5)
    for path, gradient in gradients(bank).items():
        assert relative(gradient, want_gradients[path]) < 1e-4, path


def test_no_logits_of_a_whole_batch_ever_exist():
    model, examples = tiny("bert", task="masked-lm"), random_examples("masked-lm")
    judged, largest = int(examples.supervised_counts().sum()), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            own = isinstance(out, torch.Tensor) and out.shape[-1:] == (97,) and out.shape != (32, 97)  # the weight's
            if own and out.dim() > 1:
                largest = max(largest, out[..., 0].numel())
            return out

    with Bank(model) as bank:
        bank.add("a", spec("minimal"))
        with Forward(bank, task_for(examples)) as forward, Watch():
            forward.learn(examples, range(6), [("a", 6)], np.ones(6), tick=0)
            forward.measure(examples, range(6), [("a", 6)])
    assert 0 < largest <= judged < examples.lengths().sum()


@pytest.mark.parametrize(("task", "name"), [("masked-lm", "bert"), ("masked-lm", "roberta"), ("masked-lm", "albert")])
def test_attention_that_leaks_between_documents_is_found_out(monkeypatch, task, name):
    attend = attention.attend

    def leaking(q, k, v, spans, *rest, **named):
        return attend(q, k, v, attention.Spans((0, len(q))), *rest, **named)

    monkeypatch.setattr(attention, "attend", leaking)
    with Bank(tiny(name, task=task)) as bank, Forward(bank, task_named(task)) as forward:
        assert (forward.layout, forward.reason) == ("rows", "two packed documents do not come out as they do alone")


def test_positions_that_begin_elsewhere_are_found_out(monkeypatch):
    """RoBERTa's begin behind the number of its padding; counted from 0 a packed stream comes out differently."""
    task = task_named("masked-lm")
    with Bank(tiny("roberta", task="masked-lm")) as bank, Forward(bank, task) as forward:
        assert (forward.layout, forward.task.first_position) == ("packed", 2)
    build = task.packed
    monkeypatch.setattr(task, "packed", lambda self, *given: build(_counted_from_0(self), *given))
    with Bank(tiny("roberta", task="masked-lm")) as bank, Forward(bank, task) as forward:
        assert forward.layout == "rows"


def _counted_from_0(task):
    task.first_position = 0
    return task


@pytest.mark.parametrize(("task", "name"), [("sequence-classification", "bert"), ("sequence-classification", "llama")])
def test_bfloat16_on_compiled_kernels_stays_near_the_truth(task, name):
    """Rows go through the compiled attention there, and each is as it is alone."""
    examples, weights, found = random_labelled([40, 25, 60]), np.ones(3) / 3, {}
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny(name, torch.bfloat16, task=task).to(dtype)
        with Bank(model) as bank:
            trained(bank, "a", spec("all-linear"), size=0.1)
            with Forward(bank, task_for(examples)) as forward:
                found[dtype] = forward.learn(examples, range(3), [("a", 3)], weights, tick=1), gradients(bank)
                ours = model.config._attn_implementation == attention.NAME
                assert ours == (dtype == torch.bfloat16 and native() is not None)
    low, high = found[torch.bfloat16], found[torch.float32]
    np.testing.assert_allclose(low[0].documents, high[0].documents, rtol=0.05)
    for path in high[1]:
        assert relative(low[1][path], high[1][path]) < 0.1, path


def test_rows_are_documents_and_what_fills_them_up():
    assert Rows(np.array([3, 5, 1])).spans(3, 5).bounds == (0, 3, 5, 10, 11, 15)
    assert Rows(None).spans(2, 4).bounds == (0, 4, 8)
    with pytest.raises(UnpackableError, match="2 rows of attention for 3 documents"):
        Rows(np.array([3, 5, 1])).spans(2, 5)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

WRONG = [
    ("masked-lm", "llama", None, "sees only what comes before"),
    ("masked-lm", "t5", None, "an encoder beside its decoder"),
    ("masked-lm", "bert", "sequence-classification", "no language-model head"),
    ("seq2seq", "llama", None, "no encoder beside its decoder"),
    ("sequence-classification", "bert", "masked-lm", "gives logits"),
    ("sequence-classification", "vit", "image-classification", "reads no text"),
    ("image-classification", "bert", "sequence-classification", "gives no logits for pixel_values"),
    ("causal-lm", "bert", "sequence-classification", "no language-model head"),
]


@pytest.mark.parametrize(("task", "name", "made_for", "words"), WRONG)
def test_a_model_made_for_something_else_is_refused_in_plain_words(task, name, made_for, words):
    model = tiny(name, task=made_for)
    before = state_of(model)
    with Bank(model) as bank, pytest.raises(ModelError, match=words) as caught, Forward(bank, task_named(task)):
        pass
    assert caught.value.hint
    assert state_of(model) == before


def test_a_model_that_does_not_know_its_padding_is_refused_in_plain_words():
    model = tiny("llama", task="sequence-classification")
    model.config.pad_token_id = None
    task = task_named("sequence-classification")
    with Bank(model) as bank, pytest.raises(ModelError, match="no padding token"), Forward(bank, task):
        pass


def test_the_tasks_of_the_engine_are_those_that_are_named():
    assert [task_named(name) for name in NAMED] == [
        task_for(examples) for examples in (random_corpus([5, 5]), *map(random_examples, list(NAMED)[1:]))
    ]
    with pytest.raises(TypeError, match="expected one of Corpus"):
        task_for([])
