"""The laws of docs/design.md for every form × scaling × storage × start, at every kind of site: tests/grid.py's table.

One model a cell, which holds what the start gives (`fresh`), a copy of it that was moved (`task`) and another adapter.
"""

from dataclasses import dataclass
from typing import get_args

import peft
import pytest
import torch
from torch import Tensor, nn

from rankwise.adapters.scaling import Scaling
from rankwise.adapters.spec import Form, Init, LoraSpec
from rankwise.engine.begin import begin
from rankwise.errors import SpecError
from rankwise.frozen.coded import CodedLinear, hold
from rankwise.kernels.sizes import Storage
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.formats.test_peft import exactly
from tests.grid import (
    CELLS,
    CODE_STARTS,
    DATA_STARTS,
    EVERY_CELL,
    EVERY_START,
    FORMS,
    RESIDUAL_STARTS,
    SCALINGS,
    STORAGES,
    Cell,
    moved,
    relative,
    spec,
    state_of,
    trained,
)
from tests.models import every_site, output, tiny, words

WORDS = random_corpus([12, 9, 20, 15, 8, 11])
RESIDUAL = (*RESIDUAL_STARTS, "lora_ga")


def clean(cell: Cell) -> nn.Module:
    """A causal language model where a start looks at documents; else a model with every kind of site."""
    return (tiny("llama") if cell.start in DATA_STARTS else every_site()).requires_grad_(False)


def chosen(cell: Cell) -> LoraSpec:
    narrower = dict.fromkeys(DATA_STARTS, ("q_proj", "down_proj")) | dict.fromkeys(CODE_STARTS, ("linear", "across"))
    return spec(narrower.get(cell.start, ".*"), form=cell.form, scaling=cell.scaling, init=cell.start, rank=2)


def begun(bank: Bank, cell: Cell) -> None:
    if cell.start in DATA_STARTS:
        begin(bank, "fresh", chosen(cell), WORDS)
    else:
        bank.add("fresh", chosen(cell))


@dataclass(frozen=True)
class World:
    cell: Cell
    bank: Bank
    inputs: dict[str, Tensor]

    def through(self, name: str | None, rows: slice = slice(None)) -> Tensor:
        with self.bank.use(name):
            return output(self.bank.model, {key: x[rows] for key, x in self.inputs.items()})

    def dense(self) -> nn.Module:
        """The base in no codes, with the very weights that they stand for."""
        model = clean(self.cell)
        for path, layer in self.bank.modules.items():
            if isinstance(layer, CodedLinear):
                model.get_submodule(path).weight.copy_(layer.weight)
        return model


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: cell.name)
def world(request):
    cell = request.param
    model = hold(clean(cell), cell.storage, remainder_rank=2)
    before = state_of(model)
    with Bank(model) as bank:
        begun(bank, cell)
        bank.put("task", bank.adapter("fresh"))
        moved(bank, "task", size=0.3 if cell.form == "adalora" else 0.1)  # a product of three: B·Λ·A
        trained(bank, "other", spec("all-linear", rank=1), seed=5)
        yield World(cell, bank, words(4))
    assert state_of(model) == before


def test_the_table_has_every_choice_that_there_is():
    assert (set(FORMS), set(SCALINGS), set(STORAGES)) == tuple(map(set, map(get_args, (Form, Scaling, Storage))))
    assert set(EVERY_START) == set(get_args(Init))
    assert len(set(EVERY_CELL)) == len(EVERY_CELL)


@pytest.mark.parametrize("cell", [cell for cell in EVERY_CELL if cell.refused], ids=lambda cell: cell.name)
def test_what_is_no_cell_is_refused_with_a_reason(cell):
    model = hold(clean(cell), cell.storage, remainder_rank=2)
    before = state_of(model)
    with Bank(model) as bank, pytest.raises(SpecError, match=f"init '?{cell.start}"):
        begun(bank, cell)
    assert state_of(model) == before


@torch.no_grad()
def test_a_start_is_the_base(world):
    base, fresh = world.through(None), world.through("fresh")
    if world.cell.start in RESIDUAL:
        assert relative(fresh, base) < 1e-5
        assert all(own.A.any() and own.B.any() for own in world.bank.adapter("fresh").sites.values())
    elif world.cell.start in CODE_STARTS:  # nearer to the dense base: tests/frozen/test_coded.py says how near
        assert not torch.equal(fresh, base)
    else:
        assert torch.equal(fresh, base)


@torch.no_grad()
def test_forward_is_merged(world):
    want = world.through("task")
    assert relative(world.through(None), want) > 0.05, "the adapter does too little for the test to see"
    bank = world.bank
    assert bank.merge("task").layers == len(bank.adapter("task").sites)
    try:
        merged = output(bank.model, world.inputs)
    finally:
        bank.unmerge()
    assert relative(merged, want) < 1e-5
    assert torch.equal(world.through("task"), want)


def test_routed_equals_alone(world):
    names = ["task", None, "other", "task"]
    parameters = {f"{n}/{path}": p for n in ("task", "other") for path, p in world.bank.named_parameters(n)}
    alone = [world.through(name, slice(row, row + 1)) for row, name in enumerate(names)]
    loss = torch.randn(torch.cat(alone).shape)
    with world.bank.route(names):
        together = output(world.bank.model, world.inputs)
    learning = torch.cat([row for row, name in zip(alone, names, strict=True) if name is not None])
    want = torch.autograd.grad(learning, list(parameters.values()), loss[[0, 2, 3]])
    got = torch.autograd.grad(together, list(parameters.values()), loss)
    for row, out in enumerate(alone):
        assert relative(together[row], out[0]) < 1e-5
    for path, a, b in zip(parameters, got, want, strict=True):
        assert b.norm() > 0, path
        assert relative(a, b) < 1e-4, path


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_saved_is_loaded_here_and_by_peft(world, tmp_path):
    want, bank = world.through("task"), world.bank
    bank.save("task", tmp_path)
    with Bank(hold(clean(world.cell), world.cell.storage)) as other:
        other.load("again", tmp_path)
        plain, again = bank.adapter("task").plain(), other.adapter("again")
        assert list(again.sites) == list(plain.sites)
        for (name, tensor), (path, saved) in zip(again.tensors(), plain.tensors(), strict=True):
            assert name == path
            assert torch.equal(tensor, saved), path
        for path, own in again.sites.items():
            assert own.scale == pytest.approx(plain.sites[path].scale, rel=1e-12)
            assert relative(own.delta(), bank.adapter("task").sites[path].delta()) < 1e-6
        with other.use("again"):
            assert relative(output(other.model, world.inputs), want) < 1e-5
    if world.cell.storage == "dense" or world.cell.start in CODE_STARTS:  # a folder says nothing of storage
        theirs = peft.PeftModel.from_pretrained(world.dense(), tmp_path).eval()
        assert relative(exactly(theirs, world.inputs), want) < 1e-5
