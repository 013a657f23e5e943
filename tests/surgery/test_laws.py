"""The laws of docs/design.md that concern one forward pass, on the whole grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import BankError, RouteError
from rankwise.surgery.bank import Bank
from tests.grid import DTYPES, FORMS, SCALINGS, STARTS, STORAGES, relative, spec, state_of, trained
from tests.models import ARCHITECTURES, output, tiny

EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
LOW = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EVERY
@LOW
@pytest.mark.parametrize("start", STARTS)
@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit(name, dtype, start):
    model = tiny(name, dtype).requires_grad_(False)  # torch chooses convolution kernels by this flag, with other bits
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ARCHITECTURES[name].inputs(3).items()}
    before = output(model, inputs)
    with Bank(model) as bank:
        bank.add("fresh", spec(ARCHITECTURES[name].targets, init=start))
        with bank.use("fresh"):
            assert torch.equal(output(model, inputs), before)
        assert torch.equal(output(model, inputs), before)


@EVERY
@LOW
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scaling", SCALINGS)
@torch.no_grad()
def test_forward_is_merged(name, dtype, form, storage, scaling):
    model, truth = tiny(name, dtype), tiny(name, dtype).float()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ARCHITECTURES[name].inputs(3).items()}
    exact = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    chosen = spec(ARCHITECTURES[name].targets, form=form, storage=storage, scaling=scaling)
    with Bank(model) as bank, Bank(truth) as reference:
        trained(bank, "task", chosen)
        trained(reference, "task", chosen)
        with reference.use("task"):
            want = output(truth, exact)
        assert relative(output(truth, exact), want) > 0.05, "the adapter does too little for the test to see"
        with bank.use("task"):
            adapted = output(model, inputs)
        report = bank.merge("task")
        merged = output(model, inputs)
        assert report.layers == len(bank.adapter("task").sites)
        if dtype == torch.float32:
            assert relative(merged, adapted) < 1e-5
        else:  # one more rounding of each weight may cost no more than the number format has cost already
            assert relative(merged, want) < 2 * relative(adapted, want) + 0.01
        bank.unmerge()
        with bank.use("task"):
            assert torch.equal(output(model, inputs), adapted)


@EVERY
def test_rows_routed_equal_rows_alone(name):
    model, rows = tiny(name), 4
    inputs = ARCHITECTURES[name].inputs(rows)
    with Bank(model) as bank:
        trained(bank, "one", spec(ARCHITECTURES[name].targets), seed=1)
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


@pytest.mark.parametrize("name", ["llama-tied", "t5", "gpt2", "unet", "roberta"])
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 3)), max_size=25))
@settings(max_examples=100, deadline=None)
def test_undo_is_exact_in_any_order(name, steps):
    model = tiny(name)
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


def _operate(bank: Bank, what: str, own: str, inputs: dict[str, torch.Tensor], targets: tuple[str, ...]) -> None:
    if what == "add":
        trained(bank, own, spec(targets, rank=1 + int(own[1:])), seed=int(own[1:]))
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
