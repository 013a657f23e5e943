"""Starts through the engine: reproducible, kept, taken up again; what is refused, and in which words."""

import os
import signal
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from rankwise.engine.begin import begin
from rankwise.engine.folder import held_folder
from rankwise.engine.interrupt import Interrupted
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run, Start
from rankwise.errors import BankError, DataError, RankwiseWarning, RunFolderError, SpecError, TargetError, TrainingError
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus, random_masked
from tests.grid import DATA_STARTS, RESIDUAL_FORMS, RESIDUAL_STARTS, STARTS, spec, state_of
from tests.models import ARCHITECTURES, VOCAB, tiny

CORPUS = random_corpus([12, 9, 20, 15, 8, 11, 17, 5])
LOOK = Start(micro_tokens=40)
COMPUTED = pytest.mark.parametrize("init", [*RESIDUAL_STARTS, *DATA_STARTS])


def digest(chosen, seed=0, corpus=CORPUS, model="llama", **settings):
    """Of a fresh adapter, and how it began."""
    with Bank(tiny(model)) as bank:
        begun = begin(bank, "a", chosen, corpus, seed, **{"start": LOOK, **settings})
        return bank.adapter("a").digest(), begun


# ── what every start is held to ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("init", [*STARTS, *RESIDUAL_STARTS])
def test_a_start_that_needs_no_documents_is_the_banks(init):
    chosen = spec("all-linear", init=init, modules_to_save=("norm",))
    with Bank(tiny("llama")) as bank:
        bank.add("a", chosen, seed=3)
        want = bank.adapter("a").digest()
    assert digest(chosen, seed=3)[0] == want


@pytest.mark.parametrize("form", RESIDUAL_FORMS)
@pytest.mark.parametrize("init", DATA_STARTS)
def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(init, form):
    chosen = spec("all-linear", init=init, form=form)
    few = {"start": Start(documents=4, micro_tokens=40)}
    first, again, other = (digest(chosen, seed, **few) for seed in (1, 1, 2))
    assert first[0] == again[0] != other[0]
    assert first[1].documents == 4


@pytest.mark.parametrize("init", DATA_STARTS)
def test_the_model_and_what_else_the_bank_holds_are_left_as_they_were(init):
    model = tiny("llama")
    before, told = state_of(model), []
    with Bank(model) as bank:
        begin(bank, "a", spec("all-linear", init=init), CORPUS, start=LOOK, advance=told.append)
        bank.remove("a")
        assert state_of(model) == before
        bank.add("other", spec(("q_proj", "lm_head")))
        held = bank.adapter("other").digest()
        begin(bank, "a", spec(("q_proj", "up_proj", "lm_head"), init=init), CORPUS, start=LOOK)
        assert bank.adapter("other").digest() == held
        assert all(parameter.grad is None for name in bank.names for _, parameter in bank.named_parameters(name))
    assert state_of(model) == before
    assert told == sorted(told)
    assert 0 < told[0] <= told[-1] <= 1


@pytest.mark.parametrize("init", DATA_STARTS)
def test_modules_trained_whole_begin_as_the_base(init):
    with Bank(tiny("llama")) as bank:
        begin(bank, "a", spec(("q_proj",), init=init, modules_to_save=("norm",)), CORPUS, start=LOOK)
        ((path, own),) = bank.adapter("a").modules.items()
        assert path == "model.norm"
        assert torch.equal(own["weight"], bank.modules[path].weight)


@pytest.mark.parametrize("init", DATA_STARTS)
def test_layers_that_no_token_reaches_begin_by_chance(init):
    model = tiny("llama")
    model.model.layers[0].mlp.spare = nn.Linear(32, 48, bias=False)
    with Bank(model) as bank:
        bank.add("kaiming", spec(("spare",)), seed=5)
        want = bank.adapter("kaiming").sites["model.layers.0.mlp.spare"]
        begun = begin(bank, "a", spec(("spare", "q_proj"), init=init), CORPUS, 5, start=LOOK)
        got = bank.adapter("a").sites["model.layers.0.mlp.spare"]
        assert torch.equal(got.A, want.A)
        assert not got.B.any()
    assert begun.unreached == 1


@pytest.mark.parametrize("init", DATA_STARTS)
def test_only_layers_that_are_chosen_are_looked_at(init):
    chosen = spec(("q_proj", "up_proj"), init=init, exclude=(r"model.layers.0.mlp.up_proj",), layers="0")
    with Bank(tiny("llama")) as bank:
        begin(bank, "a", chosen, CORPUS, start=LOOK)
        adapter = bank.adapter("a")
    assert [*adapter.sites] == ["model.layers.0.self_attn.q_proj"]
    assert (adapter.spec.exclude, adapter.spec.layers) == (chosen.exclude, chosen.layers)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("init", DATA_STARTS)
def test_documents_may_hold_tokens_that_the_adapter_brings(init, model):
    """Until they are trained they are what an enlarged model has at their place: the mean of its rows."""
    words = random_corpus([12, 9, 20, 15])
    words.tokens[[5, 14, 30]] = VOCAB
    names, grown = ARCHITECTURES[model].targets[:1], tiny(model)
    grown.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in {grown.get_input_embeddings().weight, grown.get_output_embeddings().weight}:
            weight[VOCAB] = weight[:VOCAB].mean(0)
    with Bank(grown) as bank:
        begin(bank, "a", spec(names, init=init), words, start=LOOK)
        want = bank.adapter("a").sites
        with Bank(tiny(model)) as other:
            begin(other, "a", spec(names, init=init, new_tokens=(VOCAB,), trained_tokens=(7,)), words, start=LOOK)
            got = other.adapter("a")
            other.add("plain", spec(names, new_tokens=(VOCAB,), trained_tokens=(7,)))
            for path, rows in other.adapter("plain").tokens.items():
                assert torch.equal(rows.rows, got.tokens[path].rows)
    assert got.tokens
    for path, factors in want.items():
        torch.testing.assert_close(got.sites[path].A, factors.A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(got.sites[path].B, factors.B, rtol=1e-3, atol=1e-4)


# ── kept, and taken up again ─────────────────────────────────────────────────────────────────────────────────────────


def run(out, init, form="lora", model="llama", start=LOOK, **settings):
    """A short run with a start of this kind: its tensors at the end, the losses of its steps, how it began."""
    losses = []
    watch = settings.pop("observe", lambda event: None)

    def observe(event):
        if event["kind"] == "step":
            losses.append((event["step"], event["loss"]))
        watch(event)

    with Bank(tiny(model)) as bank, ExitStack() as held:
        folder = held.enter_context(held_folder(out, resume=settings.get("resume", False)))
        begun = begin(bank, "a", spec("all-linear", init=init, form=form), CORPUS, start=start, out=folder)
        loop = Loop(batch_tokens=30, max_steps=9, save_every=2)
        train(bank, {"a": Run(lr=5e-3)}, CORPUS, loop=loop, out=folder, observe=observe, **settings)
        return bank.adapter("a").digest(), losses, begun


def stopping(step):
    def stop(event):
        if event["kind"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


@COMPUTED
@pytest.mark.parametrize("form", RESIDUAL_FORMS)
def test_a_run_resumed_after_a_computed_start_equals_one_that_was_not_to_the_bit(tmp_path, init, form):
    want, losses, first = run(tmp_path / "whole", init, form)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", init, form, observe=stopping(5))
    got, rest, begun = run(tmp_path / "cut", init, form, resume=True)
    assert got == want
    assert rest == losses[5:]
    again = run(tmp_path / "cut", init, form, resume=True)[2]
    assert again == begun != first, "computed again: it took other seconds"


def test_a_run_stopped_before_its_first_checkpoint_takes_its_start_up_again(tmp_path):
    want, losses, _ = run(tmp_path / "whole", "lora_ga")
    with Bank(tiny("llama")) as bank, held_folder(tmp_path / "cut", resume=False) as folder:
        begun = begin(bank, "a", spec("all-linear", init="lora_ga"), CORPUS, start=LOOK, out=folder)
    assert run(tmp_path / "cut", "lora_ga", resume=True) == (want, losses, begun)


def test_a_damaged_start_is_computed_again(tmp_path):
    want, _, _ = run(tmp_path / "whole", "eva")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", "eva", observe=stopping(5))
    kept = tmp_path / "cut" / "checkpoints" / "start" / "factors.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.warns(RankwiseWarning, match="damaged, and is computed again: start: factors.safetensors is not what"):
        assert run(tmp_path / "cut", "eva", resume=True)[0] == want
    assert run(tmp_path / "cut", "eva", resume=True)[0] == want  # and kept anew


def test_a_start_of_other_documents_or_settings_is_not_taken_up(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, "lora_ga", observe=stopping(5))
    with pytest.raises(RunFolderError, match=r"start\.documents: was 128, is 3"):
        run(tmp_path, "lora_ga", start=Start(documents=3, micro_tokens=40), resume=True)


def test_a_run_is_not_resumed_with_another_start_than_it_had(tmp_path):
    """What a residual start takes off is no part of the checkpoints, so it must be the same one."""
    corpora = CORPUS, random_corpus([9, 14, 7], seed=8)
    loop, watch = Loop(batch_tokens=30, max_steps=9), {"observe": stopping(3)}
    for corpus, settings, ending in zip(corpora, (watch, {"resume": True}), (Interrupted, RunFolderError), strict=True):
        with Bank(tiny("llama")) as bank, held_folder(tmp_path, resume="resume" in settings) as folder:
            begin(bank, "a", spec("all-linear", init="lora_ga"), corpus, start=LOOK)
            with pytest.raises(ending) as caught:
                train(bank, {"a": Run()}, CORPUS, loop=loop, out=folder, **settings)
    assert "adapters.a.start: was" in str(caught.value)


def test_a_disk_that_cannot_keep_the_start_does_not_end_the_run(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with Bank(tiny("llama")) as bank, held_folder(tmp_path, resume=True) as folder:
        with pytest.warns(RankwiseWarning, match="the start is not kept, and resuming will compute it again"):
            begin(bank, "a", spec(init="eva"), CORPUS, start=LOOK, out=folder)
        assert bank.names == ("a",)


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("init", DATA_STARTS)
def test_a_bank_alone_says_where_such_a_start_comes_from(init):
    with Bank(tiny("llama")) as bank:
        with pytest.raises(SpecError, match=rf"init '{init}' is found in documents[\s\S]*rankwise\.begin\(bank, name"):
            bank.add("a", spec(init=init))
        assert not bank.names


REFUSED = [
    ("llama", {"init": "eva", "rank_pattern": {"q_proj": 2}}, {}, SpecError, "rank_pattern.*\n.*say rho=1"),
    ("llama", {"init": "eva", "rank": 40}, {}, SpecError, "q_proj: rank 40 of inputs 32 wide"),
    ("llama", {"init": "eva", "rank": 30}, {"start": Start(documents=1)}, DataError, "supervised tokens in the 1 doc"),
    ("gpt2", {"init": "eva", "targets": ("wte", "c_fc")}, {}, SpecError, "layers:\n  transformer.wte: embedding"),
    ("llama", {"init": "lora_ga", "rank": 9}, {}, SpecError, r"k_proj: 2 × 9 of 16"),
    ("llama", {"init": "lora_ga", "targets": ("no_proj",)}, {}, TargetError, "'no_proj' matches no layer"),
    ("llama", {"init": "eva", "modules_to_save": ("nom",)}, {}, TargetError, "'nom' matches no module"),
    ("llama", {"init": "lora_ga", "trained_tokens": (VOCAB,)}, {}, TargetError, f"trained_tokens {VOCAB}: the model"),
    ("llama", {"init": "lora_ga"}, {"corpus": random_corpus([])}, DataError, "no documents"),
]


@pytest.mark.parametrize(("model", "chosen", "given", "error", "words"), REFUSED)
def test_what_makes_no_sense_is_refused_before_anything_is_looked_at(model, chosen, given, error, words):
    with Bank(tiny(model)) as bank:
        before, given = state_of(bank.model), {"corpus": CORPUS, **given}
        told = []
        with pytest.raises(error, match=words):
            begin(bank, "a", spec(**chosen), given.pop("corpus"), advance=told.append, **given)
        assert not told
        assert not bank.names
        assert state_of(bank.model) == before


def test_a_name_that_is_taken_and_a_model_in_float16_are_refused():
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec())
        with pytest.raises(BankError, match="already holds an adapter 'a'"):
            begin(bank, "a", spec(init="eva"), CORPUS)
        assert bank.names == ("a",)
    with Bank(tiny("llama", torch.float16)) as bank, pytest.raises(SpecError, match="float16 is not trained"):
        begin(bank, "a", spec(init="lora_ga"), CORPUS)


@pytest.mark.parametrize(("init", "words"), [("eva", "is not finite"), ("lora_ga", "not finite at 14 layers")])
def test_numbers_that_are_not_finite_are_told_and_leave_nothing_behind(init, words):
    model, corpus = tiny("llama"), random_corpus([12, 9, 20, 15])
    corpus.tokens[5] = 2  # a word that the engine's own probe does not use
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = float("inf")
    with Bank(model) as bank:
        with pytest.raises(TrainingError, match=words):
            begin(bank, "a", spec("all-linear", init=init), corpus)
        assert not bank.names


def test_a_layer_that_is_not_given_every_token_is_refused_by_eva():
    model = tiny("llama")
    model.model.layers[1].mlp = Some()
    with Bank(model) as bank:
        with pytest.raises(SpecError, match=r"layers\.1\.mlp\.expert: init 'eva' looks at every token.* given \d+ of"):
            begin(bank, "a", spec(("expert",), init="eva"), CORPUS, start=LOOK)
        assert not begin(bank, "a", spec(("expert",), init="lora_ga"), CORPUS, start=LOOK).unreached


class Some(nn.Module):
    """A layer for the tokens with a positive first feature, as an expert has it."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mine = x[..., 0] > 0
        y = torch.zeros_like(x)
        y[mine] = self.expert(x[mine])
        return y


@pytest.mark.parametrize("init", DATA_STARTS)
def test_documents_of_another_task_are_not_looked_at(init):
    with Bank(tiny("llama")) as bank:
        with pytest.raises(SpecError, match="for another task"):
            begin(bank, "a", spec("lora", init=init), random_masked([9, 7]))
        assert bank.names == ()
