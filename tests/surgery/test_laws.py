"""The laws of docs/design.md that concern one forward pass, on the whole grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.engine.begin import begin
from rankwise.errors import BankError, RouteError
from rankwise.frozen.coded import hold
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import (
    DATA_STARTS,
    DTYPES,
    FORMS,
    RESIDUAL_FORMS,
    RESIDUAL_STARTS,
    SCALINGS,
    STARTS,
    STORAGES,
    moved,
    relative,
    spec,
    state_of,
    trained,
)
from tests.models import ARCHITECTURES, CAUSAL, VOCAB, output, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*PEFT's A has neither dilation")  # of the UNet, when it is saved
EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
LOW = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EVERY
@LOW
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit(name, dtype, form, start, storage):
    model = hold(tiny(name, dtype), storage)
    model.requires_grad_(False)  # torch chooses convolution kernels by this flag, with other bits
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ARCHITECTURES[name].inputs(3).items()}
    before = output(model, inputs)
    with Bank(model) as bank:
        bank.add("fresh", spec(ARCHITECTURES[name].targets, form=form, init=start))
        with bank.use("fresh"):
            assert torch.equal(output(model, inputs), before)
        assert torch.equal(output(model, inputs), before)


@EVERY
@pytest.mark.parametrize("start", RESIDUAL_STARTS)
@pytest.mark.parametrize("form", RESIDUAL_FORMS)
@torch.no_grad()
def test_a_residual_start_changes_nothing_but_roundings_and_never_the_base(name, form, start):
    model = tiny(name).requires_grad_(False)
    inputs, state = ARCHITECTURES[name].inputs(3), state_of(model)
    before = output(model, inputs)
    with Bank(model) as bank:
        bank.add("fresh", spec(ARCHITECTURES[name].targets, form=form, init=start, rank=2))
        with bank.use("fresh"):
            assert relative(output(model, inputs), before) < 1e-5
        assert torch.equal(output(model, inputs), before)
        assert all(factors.B.any() for factors in bank.adapter("fresh").sites.values())
    assert state_of(model) == state


CAUSALLY = pytest.mark.parametrize("name", CAUSAL)
WORDS = random_corpus([12, 9, 20, 15, 8, 11])


@CAUSALLY
@LOW
@pytest.mark.parametrize("form", RESIDUAL_FORMS)
@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_an_eva_start_changes_no_bit(name, dtype, form, storage):
    model, inputs = hold(tiny(name, dtype), storage).requires_grad_(False), ARCHITECTURES[name].inputs(3)
    state, before = state_of(model), output(model, inputs)
    with Bank(model) as bank:
        begin(bank, "fresh", spec("all-linear", form=form, init="eva"), WORDS)
        with bank.use("fresh"):
            assert torch.equal(output(model, inputs), before)
        assert all(factors.A.any() for factors in bank.adapter("fresh").sites.values())
    assert state_of(model) == state


@CAUSALLY
@pytest.mark.parametrize("form", RESIDUAL_FORMS)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_lora_ga_start_changes_nothing_but_roundings_and_never_the_base(name, form, storage):
    model, inputs = hold(tiny(name), storage).requires_grad_(False), ARCHITECTURES[name].inputs(3)
    state = state_of(model)
    with torch.no_grad(), Bank(model) as bank:
        before = output(model, inputs)
        with torch.enable_grad():
            begin(bank, "fresh", spec(ARCHITECTURES[name].targets, form=form, init="lora_ga", rank=2), WORDS)
        with bank.use("fresh"):
            assert relative(output(model, inputs), before) < 1e-5
        assert torch.equal(output(model, inputs), before)
        assert all(factors.B.any() for factors in bank.adapter("fresh").sites.values())
    assert state_of(model) == state


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("start", DATA_STARTS)
@pytest.mark.parametrize("form", RESIDUAL_FORMS)
def test_a_start_found_in_documents_is_saved_as_a_plain_adapter_of_the_base(name, form, start, tmp_path):
    model, inputs = tiny(name), ARCHITECTURES[name].inputs(3)
    with Bank(model) as bank:
        begin(bank, "task", spec("all-linear", form=form, init=start, rank=2), WORDS)
        moved(bank, "task")
        with torch.no_grad(), bank.use("task"):
            want = output(model, inputs)
        with torch.no_grad():
            assert relative(output(model, inputs), want) > 0.05
        bank.save("task", tmp_path)
        bank.load("again", tmp_path)
        with torch.no_grad(), bank.use("again"):
            torch.testing.assert_close(output(model, inputs), want, rtol=1e-5, atol=1e-5)
        ranks = [factors.rank for factors in bank.adapter("again").sites.values()]
        assert sum(ranks) == (2 if start == "eva" else 4) * len(ranks)


@pytest.mark.parametrize("name", ["llama", "gpt2", "unet"])
@pytest.mark.parametrize("start", RESIDUAL_STARTS)
@pytest.mark.parametrize("form", RESIDUAL_FORMS)
@torch.no_grad()
def test_a_residual_start_is_saved_as_a_plain_adapter_of_the_base(name, form, start, tmp_path):
    model, inputs = tiny(name), ARCHITECTURES[name].inputs(3)
    with Bank(model) as bank:
        trained(bank, "task", spec(ARCHITECTURES[name].targets, form=form, init=start, rank=2))
        with bank.use("task"):
            want = output(model, inputs)
        assert relative(output(model, inputs), want) > 0.05
        bank.save("task", tmp_path)
        bank.load("again", tmp_path)
        with bank.use("again"):
            torch.testing.assert_close(output(model, inputs), want, rtol=1e-5, atol=1e-5)
        assert {factors.rank for factors in bank.adapter("again").sites.values()} == {4}


@EVERY
@LOW
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scaling", SCALINGS)
@torch.no_grad()
def test_forward_is_merged(name, dtype, form, storage, scaling):
    chosen = spec(ARCHITECTURES[name].targets, form=form, scaling=scaling)
    merged, adapted, want, base, base_wanted = merged_and_adapted(name, dtype, chosen, storage)
    if dtype == torch.float32:
        assert relative(merged, adapted) < 1e-5
    else:  # one more rounding of each weight may cost no more than the number format has cost already
        cost = max(typical(adapted, want), typical(base, base_wanted))
        assert typical(merged, want) < 2 * cost + 0.01


def typical(got: torch.Tensor, want: torch.Tensor) -> float:
    """The middle one of the vectors' relative differences: a rounding may send a few tokens to other experts."""
    apart, size = ((x.double().flatten(0, -2)).norm(dim=-1) for x in (got - want, want))
    return float((apart / size.clamp(min=1e-30)).median())


def merged_and_adapted(name, dtype, chosen, storage) -> tuple[torch.Tensor, ...]:
    """What comes out with an adapter merged, of base + adapter and of that in float32, of the base and of that too."""
    model, truth = hold(tiny(name, dtype), storage), hold(tiny(name, dtype).float(), storage)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ARCHITECTURES[name].inputs(3).items()}
    exact = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    with Bank(model) as bank, Bank(truth) as reference:
        trained(bank, "task", chosen)
        trained(reference, "task", chosen)
        with reference.use("task"):
            want = output(truth, exact)
        base, base_wanted = output(model, inputs), output(truth, exact)
        assert relative(base_wanted, want) > 0.05, "the adapter does too little for the test to see"
        with bank.use("task"):
            adapted = output(model, inputs)
        assert bank.merge("task").layers == len(bank.adapter("task").sites)
        merged = output(model, inputs)
        bank.unmerge()
        with bank.use("task"):
            assert torch.equal(output(model, inputs), adapted)
    return merged, adapted, want, base, base_wanted


@EVERY
@pytest.mark.parametrize("form", FORMS)
def test_rows_routed_equal_rows_alone(name, form):
    model, rows = tiny(name), 4
    inputs = ARCHITECTURES[name].inputs(rows)
    with Bank(model) as bank:
        trained(bank, "one", spec(ARCHITECTURES[name].targets, form=form), seed=1)
        trained(bank, "other", spec(ARCHITECTURES[name].targets[:1], rank=2), seed=2)
        names = ["one", None, "other", "one"]

        def gradients() -> dict[str, torch.Tensor]:
            every = {f"{n}/{p}": t for n in bank.names for p, t in bank.named_parameters(n)}
            found = {p: torch.zeros_like(t) if t.grad is None else t.grad for p, t in every.items()}
            for tensor in every.values():
                tensor.grad = None
            return found

        weights = torch.randn(output(model, inputs).shape)  # a loss without symmetries: no gradient cancels

        alone = []
        for row, route in enumerate(names):
            with bank.use(route):
                alone.append(output(model, {k: v[row : row + 1] for k, v in inputs.items()}))
                if route is not None:
                    (alone[-1] * weights[row : row + 1]).sum().backward()
        want = gradients()
        with bank.route(names):
            together = output(model, inputs)
            (together * weights).sum().backward()
        for row, out in enumerate(alone):
            assert relative(together[row], out[0]) < 1e-5
        for path, gradient in gradients().items():
            assert relative(gradient, want[path]) < 1e-4, path


OPERATIONS = ("add", "remove", "use", "merge", "unmerge", "route", "train", "eval")


@pytest.mark.parametrize(
    ("name", "storage"),
    [*((name, "dense") for name in ("llama-tied", "t5", "gpt2", "unet", "roberta")), ("gpt2", "int8"), ("t5", "nf4")],
)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 3)), max_size=25))
@settings(max_examples=100, deadline=None)
def test_undo_is_exact_in_any_order(name, storage, steps):
    model = hold(tiny(name), storage)
    inputs, before = ARCHITECTURES[name].inputs(2), state_of(model)
    bank = Bank(model)
    values: dict[str, str] = {}
    for what, number in steps:
        own = f"a{number}"
        try:
            with torch.no_grad():
                _operate(bank, what, own, inputs, ARCHITECTURES[name].targets)
        except (BankError, RouteError):
            continue
        if what == "add":
            values[own] = bank.adapter(own).digest()
        elif what == "remove":
            del values[own]
        assert {n: bank.adapter(n).digest() for n in bank.names} == values
    bank.close()
    model.eval()
    assert state_of(model) == before


# Of the adapters a0 … a3 two have rows of tokens, where the model has an embedding that is no target.
TOKENS = {"a2": {"trained_tokens": (7, 3)}, "a3": {"new_tokens": (VOCAB, VOCAB + 1), "trained_tokens": (5,)}}


def _operate(bank: Bank, what: str, own: str, inputs: dict[str, torch.Tensor], targets: tuple[str, ...]) -> None:
    if what == "add":
        tokens = TOKENS.get(own, {}) if bank.vocabulary.embedding is not None else {}
        chosen = targets[:1] if tokens else targets
        trained(bank, own, spec(chosen, rank=1 + int(own[1:]), **tokens), seed=int(own[1:]))
    elif what == "use":
        with bank.use(own):
            output(bank.model, inputs)
    elif what == "route":
        with bank.route([own, None]):
            output(bank.model, inputs)
    elif what in ("train", "eval"):
        getattr(bank.model, what)()
    elif what == "unmerge":
        bank.unmerge()
    else:
        getattr(bank, what)(own)


@pytest.mark.parametrize("change", ["in place", "copied", "AdamW", "SGD", "A", "B"])
def test_dora_sees_every_change_of_its_factors(change):
    """Norms are kept between passes; however a factor was changed, the next pass must see it."""
    model, inputs = tiny("llama"), ARCHITECTURES["llama"].inputs(2)
    with Bank(model) as bank:
        trained(bank, "task", spec(("q_proj",), form="dora"))
        parameters = [parameter for _, parameter in bank.named_parameters("task")]
        with bank.use("task"):
            before = output(model, inputs)
            before.sum().backward()
        with torch.no_grad():
            if change in ("AdamW", "SGD"):
                getattr(torch.optim, change)(parameters, lr=0.1, fused=True).step()
            alone = [parameter for path, parameter in bank.named_parameters("task") if path.endswith(f".{change}")]
            for parameter in alone or (parameters if change in ("in place", "copied") else ()):
                parameter.copy_(parameter * 1.5) if change == "copied" else parameter.mul_(1.5)
        with bank.use("task"), torch.no_grad():
            after = output(model, inputs)
        values = bank.adapter("task")
        bank.remove("task")
        bank.put("again", values)
        with bank.use("again"), torch.no_grad():
            assert torch.equal(output(model, inputs), after)
        assert not torch.equal(before, after)
