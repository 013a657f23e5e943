"""Does an adapter that exists fit this model?  Every part that does not, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rankwise.adapters.adapter import Adapter
from rankwise.errors import AdapterMismatchError, BankError, listing
from rankwise.surgery.sites import Site
from rankwise.surgery.vocabulary import Vocabulary


def check_fits(
    adapter: Adapter, sites: Mapping[str, Site], modules: Mapping[str, nn.Module], vocabulary: Vocabulary
) -> None:
    """`sites` by every path and alias, `modules` the clean model's.

    Raises:
        AdapterMismatchError: lists every site and module that binds to nothing or has another shape.
    """
    problems = [*_site_problems(adapter, sites), *_module_problems(adapter, modules)]
    problems += vocabulary.problems(adapter.tokens) if adapter.tokens else []
    problems += _frozen_problems(adapter, modules, vocabulary)
    if problems:
        whole = len(adapter.sites) + len(adapter.modules) + len(adapter.tokens)
        raise AdapterMismatchError(
            f"the adapter does not fit this model, {len(problems)} of its {whole} parts bind to nothing:\n"
            f"{listing(problems)}",
            hint="was it made for another size, another architecture, or the model with (or without) its head?",
        )


def check_apart(adapter: Adapter, tables: Iterable[str], members: Collection[Any], rows: Iterable[str]) -> None:
    """That an adapter can be held beside others: `members` as a bank remembers them, `rows` where they have some.

    A module that one adapter trains whole can hold no site of another, and none that another trains whole.  Nor can one
    layer have rows of tokens (the adapter's `tables`) and be changed otherwise: PEFT has no way to say that.

    Raises:
        BankError: it cannot.
    """
    whole = {*adapter.modules, *(path for member in members for path in member.modules)}
    with_rows = {*tables, *rows}
    if not whole and not with_rows:
        return
    sites = {*adapter.sites, *(path for member in members for path in member.sites)}
    if both := sorted(sites & with_rows):
        raise BankError(
            f"{both[0]!r} has rows for tokens of an adapter, and is a target too, of it or of another",
            hint="exclude that layer from the targets, or keep the two in separate banks, one after the other",
        )
    parts = sites | with_rows
    for path in sorted(whole):
        inside = [p for p in sorted(whole) if p.startswith(f"{path}.")]
        inner = next((p for p in [*sorted(parts), *inside] if f"{p}.".startswith(f"{path}.")), None)
        if inner is not None:
            raise BankError(
                f"one adapter trains {path!r} whole and another changes {inner!r} inside it",
                hint="keep these two adapters in separate banks, one after the other",
            )


def _site_problems(adapter: Adapter, sites: Mapping[str, Site]) -> list[str]:
    problems = []
    for path, factors in adapter.sites.items():
        site = sites.get(path)
        if site is None:
            problems.append(f"{path}: no such layer, or one that cannot be adapted")
        elif factors.shape != site.shape:
            problems.append(f"{path}: made for a weight {_size(factors.shape)}, here it is {_size(site.shape)}")
    return problems


def _size(shape: object) -> str:
    dimensions = (shape.outputs, shape.inputs, *shape.kernel)  # type: ignore[attr-defined]
    return " × ".join(map(str, dimensions))


def _module_problems(adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[str]:
    problems = []
    for path, tensors in adapter.modules.items():
        if path not in modules:
            problems.append(f"{path}: no such module")
            continue
        own = {name: tuple(p.shape) for name, p in modules[path].named_parameters()}
        stored = {name: tuple(t.shape) for name, t in tensors.items()}
        for name in sorted(own.keys() | stored.keys()):
            if own.get(name) != stored.get(name):
                problems.append(f"{path}.{name}: stored {stored.get(name, 'nothing')}, here {own.get(name, 'nothing')}")
    return problems


def _frozen_problems(adapter: Adapter, modules: Mapping[str, nn.Module], vocabulary: Vocabulary) -> list[str]:
    problems = []
    tables = vocabulary.tables(adapter.tokens)
    for path, stored in adapter.expects.items():
        own = getattr(modules.get(path), "weight", None)
        if own is not None and path in tables:  # its last rows are the adapter's, and there may be more than here
            both = torch.ones(min(len(own), len(stored)), dtype=torch.bool)
            both[[token for token in tables[path].tokens if token < len(both)]] = False
            own, stored = own[: len(both)][both.to(own.device)], stored[: len(both)][both]
        if own is None or own.shape != stored.shape:
            here = "nothing" if own is None else tuple(own.shape)
            problems.append(
                f"{path}.weight: the adapter brings its own frozen weight {tuple(stored.shape)}, here {here}"
            )
        elif not torch.equal(own.detach().to(torch.bfloat16).cpu(), stored.to(torch.bfloat16)):
            problems.append(f"{path}.weight: the adapter brings its own frozen weight, and its values are others")
    return problems
