"""Law 3 on every architecture: whatever was done with adapters, in whatever order, the base keeps every byte."""

import random
from collections import Counter
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankwise.errors import RouteError
from rankwise.frozen.coded import hold
from rankwise.surgery.bank import Bank
from tests.grid import STORAGES, spec, state_of, trained
from tests.models import ARCHITECTURES, output, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*PEFT's A has neither dilation")  # of the UNet, when it is saved
ON_ONE = (
    "remove",
    "save",
    "merge",
    "use",
    "route",
    "stream",
    "mix",
    "learn",
)  # what can be done with an adapter that is held
CASES = [(name, STORAGES[number % len(STORAGES)]) for number, name in enumerate(ARCHITECTURES)]
SPECS = {
    "a": {},
    "b": {"form": "dora", "init": "pissa", "rank": 2},
    "c": {"form": "adalora"},
    "d": {"init": "olora", "rank": 2},
}


def whole_state(model: nn.Module) -> tuple[object, ...]:
    """`state_of`, and what else holding a model may change."""
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    buffers = [(path, id(buffer)) for path, buffer in model.named_buffers()]
    modes = [module.training for module in model.modules()]
    config = model.config.to_dict() if hasattr(model, "config") else None
    return state_of(model), hooks, buffers, modes, config


class Hands:
    """Does one thing after the other with a model's bank."""

    def __init__(self, name: str, storage: str, folder) -> None:
        self.model, self.architecture, self.folder = hold(tiny(name), storage), ARCHITECTURES[name], folder
        self.bank, self.saved = Bank(self.model), list[str]()
        self.whole = whole_state(self.model)
        self.base = [(tensor, tensor.detach().clone()) for tensor in (*self.model.parameters(), *self.model.buffers())]

    def possible(self) -> list[tuple[str, str]]:
        """What would not be refused now, and of which adapter: tests/surgery/test_laws.py does what is refused."""
        if merged := self.bank.router.merged:
            return [("use", merged), ("unmerge", merged), ("reopen", merged)]
        free = [name for name in SPECS if name not in self.bank]
        found = [("add", name) for name in free] + [("load", name) for name in free if self.saved]
        found += [("put", name) for name in free if self.bank.names]
        return found + [(what, name) for name in self.bank.names for what in ON_ONE]

    def do(self, what: str, own: str) -> None:
        last = self.bank.names[-1] if self.bank.names else None
        if what == "add":
            trained(self.bank, own, spec(self.architecture.targets, **SPECS[own]))
        elif what == "put":
            self.bank.put(own, self.bank.adapter(last))
        elif what == "save":
            self.bank.save(own, self.folder / own)
            self.saved.append(own)
        elif what == "load":
            self.bank.load(own, self.folder / self.saved[-1])
        elif what in ("remove", "merge"):
            getattr(self.bank, what)(own)
        elif what == "unmerge":
            self.bank.unmerge()
        elif what == "reopen":
            self.bank.close()
            assert whole_state(self.model) == self.whole
            self.bank = Bank(self.model)
        else:
            self.call(what, own, last)

    def call(self, what: str, own: str, other: str) -> None:
        inputs = self.architecture.inputs(1 if what == "stream" else 3)
        tokens = next(iter(inputs.values())).shape[1]
        routes = {"route": lambda: self.bank.route([own, None, other])}
        routes["stream"] = lambda: self.bank.stream([(own, 2), (None, 3), (other, tokens - 5)])
        routes["mix"] = lambda: self.bank.route([self.bank.mix({own: 0.7, other: -0.3}), own, None])
        with routes.get(what, lambda: self.bank.use(own))(), torch.set_grad_enabled(what == "learn"):
            out = output(self.model, inputs)
        if what == "learn":
            out.sum().backward()

    def check(self) -> None:
        assert all(torch.equal(tensor, kept) and tensor.grad is None for tensor, kept in self.base)


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_whatever_is_done_the_base_keeps_every_byte(name, storage, tmp_path_factory):
    hands = Hands(name, storage, tmp_path_factory.mktemp("undo"))

    @given(st.data())
    @settings(max_examples=8, database=None)
    def run(data):
        hands.saved = []
        for _ in range(data.draw(st.integers(4, 16))):
            step = data.draw(st.sampled_from(hands.possible()))
            with suppress(RouteError):  # a stream where there are no tokens: nothing may have changed for that
                hands.do(*step)
            hands.check()
        hands.do("reopen", "")

    run()


class Training(Hands):
    """Also trains, and knows how every adapter must be."""

    def __init__(self, name: str, storage: str, folder) -> None:
        super().__init__(name, storage, folder)
        self.known: dict[str, str] = {}

    def do(self, what: str, own: str) -> None:
        super().do(what, own)
        if what == "learn":  # for good: a step down its own gradient
            with torch.no_grad():
                for _, parameter in self.bank.named_parameters(own):
                    if parameter.grad is not None:
                        parameter -= 1e-3 * parameter.grad.sign()
                        parameter.grad = None
        before = self.known
        self.known = {name: self.bank.adapter(name).digest() for name in self.bank.names}
        touched = own if what == "learn" else None
        assert all(before[name] == now for name, now in self.known.items() if name in before and name != touched)
        if what == "learn":
            assert before[own] != self.known[own]


def test_a_thousand_things_done_leave_the_base_and_every_other_adapter_as_they_were(tmp_path):
    """What is loaded again is what was saved; nothing that is done with one adapter reaches another."""
    hands, chance, saved = Training("llama-tied", "dense", tmp_path), random.Random(7), {}
    done = Counter()
    for _ in range(1000):
        what, own = chance.choice(hands.possible())
        with suppress(RouteError):  # form dora in a mix: nothing may have changed for that
            hands.do(what, own)
        hands.check()
        done[what] += 1
        if what == "save":
            saved[own] = hands.bank.adapter(own).plain().digest()
        if what == "load":
            assert hands.known[own] == saved[hands.saved[-1]]
    hands.do("reopen", "")
    assert set(done) == {"add", "put", "load", *ON_ONE, "unmerge", "reopen"}
    assert min(done.values()) >= 10
