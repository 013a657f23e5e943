"""The smallest part of an adapter that is not measurably worse than the whole.

    the adapter ──▶ parts of rank one at every site (`adapters/parts.py`), by what counts (`search/worth.py`)
                ──▶ in order of what each is worth for each of its parameters
    first half of the documents ──▶ how few of them stay within the tolerance: halving the interval
    second half                 ──▶ sizes from the largest down to that one, each tested once, until one fails

The second half decides, and its verdict needs no correction for several tests: sizes are tested in an order that is
fixed beforehand, and no smaller one is believed once a larger one has failed (fixed-sequence testing, Maurer, Hothorn
and Lehmacher 1995).  A size passes when the upper 95 % bound of its paired difference to the whole adapter is within
the tolerance: what is shown is that it is not worse, not merely that nobody could tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.lowrank import LowRank
from rankwise.adapters.parts import Core, Parts, core_of
from rankwise.adapters.spec import Form, LoraSpec, exactly
from rankwise.data.examples import Examples
from rankwise.data.split import split
from rankwise.engine.evaluate import Evaluation, compared, measured_documents
from rankwise.engine.forward import Forward
from rankwise.engine.paired import Difference, paired_difference
from rankwise.engine.tasks.choose import task_for
from rankwise.engine.tasks.task import Task
from rankwise.engine.trainee import check_can_learn
from rankwise.errors import DataError, SpecError, listing
from rankwise.search.tolerance import Tolerance
from rankwise.search.worth import Worth, fisher_roots, input_roots
from rankwise.surgery.bank import Bank

Tell = Callable[[str, float], None]
Measured = tuple[np.ndarray, np.ndarray]  # losses and predicted classes, by document

BOUND = 0.90  # a two-sided interval of this confidence ends at one-sided 95 % bounds
_MICRO_TOKENS = 2048  # measured at once
_CLOSE = 0.02  # of all parameters: the first half looks no closer
_LADDER = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)  # times the first half's size, what the second half tests


@dataclass(frozen=True)
class Point:
    """A size that was measured.

    Attributes:
        parts: how many of them stayed.
        parameters: of these.
        difference: to the whole adapter, nats per judged item; `high` is the one-sided 95 % bound.
        within: whether that bound is within the tolerance.
    """

    parts: int
    parameters: int
    difference: Difference
    within: bool

    def record(self) -> dict[str, Any]:
        delta = self.difference
        told = {"mean": delta.mean, "low": delta.low, "high": delta.high}
        return {"parts": self.parts, "parameters": self.parameters, "delta": told, "within": self.within}


@dataclass(frozen=True)
class Compression:
    """What was found.

    Attributes:
        adapter: the smaller one, in plain A and B.
        worth: by what the adapter was taken apart and the parts put in order.
        tolerance: nats per judged item.
        gain: of the base over the whole adapter on the first half; positive where the adapter is better.
        parts, parameters: of the whole adapter, without what a site narrower than the rank holds twice.
        first: sizes measured on the first half, the largest first.
        second: sizes tested on the second half, in the order of the tests; the last that is `within` is the adapter.
        evaluation: the base, `compressed` and `whole` on the second half.
        documents: in each half.
    """

    adapter: Adapter
    worth: Worth
    tolerance: float
    gain: Difference
    parts: int
    parameters: int
    first: tuple[Point, ...]
    second: tuple[Point, ...]
    evaluation: Evaluation
    documents: tuple[int, int]

    @property
    def chosen(self) -> Point:
        return [point for point in self.second if point.within][-1]

    @property
    def losses(self) -> dict[str, float]:
        """On the second half, nats per judged item."""
        found = self.evaluation
        of_adapters = {name: found.loss(row) for name, row in zip(found.names, found.losses, strict=True)}
        return {"base": found.loss(found.base)} | of_adapters

    @property
    def ranks(self) -> dict[str, int]:
        """Of the sites that are left."""
        return {path: factors.rank for path, factors in self.adapter.sites.items()}

    def record(self) -> dict[str, Any]:
        """What `rankwise compress --json` prints of it."""
        gain = self.gain
        return {
            "worth": self.worth,
            "tolerance": self.tolerance,
            "gain": {"mean": gain.mean, "low": gain.low, "high": gain.high},
            "parameters": {"whole": self.parameters, "compressed": self.chosen.parameters},
            "parts": {"whole": self.parts, "compressed": self.chosen.parts},
            "documents": dict(zip(("first", "second"), self.documents, strict=True)),
            "losses": self.losses,
            "delta": self.chosen.record()["delta"],
            "first": [point.record() for point in self.first],
            "second": [point.record() for point in self.second],
            "ranks": self.ranks,
        }


def compress(
    bank: Bank,
    name: str,
    examples: Examples,
    *,
    worth: Worth = "fisher",
    tolerance: Tolerance | None = None,
    seed: int = 0,
    frequencies: Sequence[int] = (),
    advance: Callable[[str, float], None] | None = None,
) -> Compression:
    """Takes out of an adapter what it does without, in evidence; the bank keeps the adapter as it is.

    Args:
        bank: holds the adapter.
        name: of it; whatever its form but `dora`.
        examples: documents that it was not trained on; half of them choose, half of them decide.
        worth: by what the adapter is taken apart and the parts are put in order.
        tolerance: how much worse it may be; 2 % of what the adapter gains by itself.
        seed: of the split.
        frequencies: what stands in the place of a base whose head is fresh, as for `evaluate`.
        advance: is told what is being done, and how far that is.

    Raises:
        BankError: no such adapter.
        SpecError: an adapter of form `dora`, or without sites; activations of layers that are not linear.
        DataError: fewer than four documents, an adapter that is not measurably better than its base where the
            tolerance is a share of that, or nothing that can be left out within the tolerance.
        TrainingError: gradients that are not finite.
    """
    whole = bank.adapter(name).plain()
    _check(whole, name)
    if len(examples) < 4:
        raise DataError(
            f"{len(examples)} documents cannot both choose and decide",
            hint="give 4 at least; 200 or more say something",
        )
    first, second = split(examples, 0.5, seed)
    tell = advance or (lambda stage, share: None)
    task = task_for(examples)
    parts = _taken_apart(bank, task, name, whole, first, worth, tell)
    switchable = {path: own.switchable() for path, own in parts.items()}
    with _probe(bank, "adalora", switchable, whole) as probe, Forward(bank, task) as forward:
        trial = _Trial(forward, name, probe, parts, _ordered(parts), tuple(frequencies), tell)
        return trial.course(first, second, tolerance or Tolerance(), whole, worth)


def _taken_apart(
    bank: Bank, task: type[Task], name: str, whole: Adapter, examples: Examples, worth: Worth, tell: Tell
) -> dict[str, Parts]:
    """The parts of every site, with those directions told apart that the worth tells apart."""
    cores = {path: core_of(factors) for path, factors in whole.sites.items()}
    if worth == "activations":
        with Forward(bank, task) as forward:
            looking = partial(tell, "looking at activations")
            roots = input_roots(forward, name, cores, examples, _MICRO_TOKENS, looking)
            return {path: core.parts(inputs=roots[path]) for path, core in cores.items()}
    if worth == "fisher":
        check_can_learn(bank)
        trainable = {path: core.trainable() for path, core in cores.items()}
        with _probe(bank, "lora", trainable, whole) as probe, Forward(bank, task) as forward:
            both = fisher_roots(forward, probe, cores, examples, partial(tell, "looking at gradients"))
            return {path: core.parts(*both[path]) if path in both else _idle(core) for path, core in cores.items()}
    return {path: core.parts() for path, core in cores.items()}


def _idle(core: Core) -> Parts:
    """Parts of a site that no loss depends on: they go first of all."""
    found = core.parts()
    return replace(found, weights=torch.zeros_like(found.weights))


@contextmanager
def _probe(bank: Bank, form: Form, sites: dict[str, LowRank], whole: Adapter) -> Iterator[str]:
    """The adapter put another way, in the bank under a name of its own for as long as it is looked at."""
    name = next(name for number in range(len(bank.names) + 1) if (name := f"parts-{number}") not in bank)
    bank.put(name, Adapter(LoraSpec(form=form), sites, whole.modules, tokens=whole.tokens))
    try:
        yield name
    finally:
        bank.remove(name)


def check_divisible(name: str, form: Form) -> None:
    """That an adapter of such a form is a sum of parts.

    Raises:
        SpecError: it is not.
    """
    if form == "dora":
        raise SpecError(
            f"{name!r} is of form dora, whose magnitudes are no sum of parts that could be left out one by one",
            hint="merge it, or train form lora, and compress that",
        )


def _check(whole: Adapter, name: str) -> None:
    check_divisible(name, whole.spec.form)
    if not whole.sites:
        raise SpecError(f"{name!r} has no low-rank part: there is nothing to take out")


@dataclass(frozen=True)
class _Order:
    """All parts, the most valuable for its parameters first.

    Attributes:
        sites, parts: of each, which site and which of its parts, `[N]`.
        parameters: of so many of them, `[N + 1]`.
    """

    sites: np.ndarray
    parts: np.ndarray
    parameters: np.ndarray

    def __len__(self) -> int:
        return len(self.sites)

    def kept(self, count: int, paths: Sequence[str]) -> dict[str, list[int]]:
        """Of every site, which parts are among the first so many, ascending."""
        found: dict[str, list[int]] = {path: [] for path in paths}
        for site, part in zip(self.sites[:count], self.parts[:count], strict=True):
            found[paths[site]].append(int(part))
        return {path: sorted(own) for path, own in found.items()}

    def holding(self, parameters: float) -> int:
        """How many parts have at most so many parameters."""
        return int(np.searchsorted(self.parameters, parameters, side="right")) - 1


def _ordered(parts: dict[str, Parts]) -> _Order:
    sites = np.concatenate([np.full(len(own), number) for number, own in enumerate(parts.values())])
    within = np.concatenate([np.arange(len(own)) for own in parts.values()])
    costs = np.concatenate([np.full(len(own), own.parameters) for own in parts.values()])
    each = np.concatenate([own.weights.numpy() for own in parts.values()]) / costs
    order = np.argsort(-each, kind="stable")
    return _Order(sites[order], within[order], np.concatenate([[0], np.cumsum(costs[order])]))


class _Trial:
    """Sizes of an adapter, measured against the whole."""

    def __init__(
        self,
        forward: Forward,
        name: str,
        probe: str,
        parts: dict[str, Parts],
        order: _Order,
        frequencies: tuple[int, ...],
        tell: Callable[[str, float], None],
    ) -> None:
        self.forward, self.name, self.probe, self.parts, self.order = forward, name, probe, parts, order
        self.frequencies, self.tell = frequencies, tell
        self.sites = forward.bank.adapter(probe).sites

    def course(
        self, first: Examples, second: Examples, tolerance: Tolerance, whole: Adapter, worth: Worth
    ) -> Compression:
        asked: list[str | None] = [self.name] if self.frequencies else [None, self.name]
        found = self.losses(first, asked, "the base and the whole adapter, first half")
        (delta,) = compared([self.name], first, *found, self.frequencies).differences
        gain = Difference(-delta.mean, -delta.high, -delta.low, delta.confidence)
        allowed = tolerance.nats(gain)
        points = self.smallest(first, found[0][-1], allowed)
        found = self.losses(second, asked, "the base and the whole adapter, second half")
        tested, smaller = self.decided(second, found[0][-1], allowed, points)
        if smaller is None:
            raise self.nothing(tested[0], allowed, len(second))
        chosen = [point for point in tested if point.within][-1]
        losses, predicted = (np.insert(a, len(a) - 1, own, axis=0) for a, own in zip(found, smaller, strict=True))
        return Compression(
            adapter=self.cut(chosen.parts, whole),
            worth=worth,
            tolerance=allowed,
            gain=gain,
            parts=len(self.order),
            parameters=int(self.order.parameters[-1]),
            first=tuple(sorted(points, key=lambda point: -point.parts)),
            second=tuple(tested),
            evaluation=compared(["compressed", "whole"], second, losses, predicted, self.frequencies),
            documents=(len(first), len(second)),
        )

    def nothing(self, point: Point, allowed: float, documents: int) -> DataError:
        delta, share = point.difference, point.parameters / self.order.parameters[-1]
        return DataError(
            f"nothing is shown to be dispensable: with {share:.0%} of its parameters the loss is {delta.mean:+.3g} "
            f"(95 % bound {delta.high:+.3g}) against the whole adapter, and {allowed:.3g} nats are allowed, on "
            f"{documents} documents",
            hint="more documents make the bound tighter; or allow more",
        )

    def losses(self, examples: Examples, names: Sequence[str | None], stage: str) -> Measured:
        def progress(done: int, of: int) -> None:
            self.tell(stage, done / of)

        losses, predicted = measured_documents(self.forward, examples, names, _MICRO_TOKENS, progress)
        if bad := np.flatnonzero(~np.isfinite(losses).all(0)).tolist():
            raise DataError(
                f"the loss is not a finite number on these documents:\n{listing(map(examples.origin, bad))}",
                hint="--dtype float32 helps where numbers were too large for the format",
            )
        return losses, predicted

    def measured(
        self, examples: Examples, reference: np.ndarray, allowed: float, count: int, half: str
    ) -> tuple[Point, Measured]:
        """A size against the whole adapter."""
        for path, kept in self.order.kept(count, list(self.parts)).items():
            self.sites[path].leave_out_all_but(torch.tensor(kept, dtype=torch.long))
        parameters = int(self.order.parameters[count])
        stage = f"{parameters / self.order.parameters[-1]:.0%} of the parameters, {half} half"
        losses, predicted = self.losses(examples, [self.probe], stage)
        difference = paired_difference(losses[0], reference, examples.supervised_counts(), BOUND)
        return Point(count, parameters, difference, difference.high <= allowed), (losses[0], predicted[0])

    def smallest(self, examples: Examples, reference: np.ndarray, allowed: float) -> list[Point]:
        """Halves the interval between nothing and everything until it is narrow."""
        points: list[Point] = []
        low, high = 0, len(self.order)  # too few as far as is known, and enough
        parameters = self.order.parameters
        while high - low > 1 and parameters[high] - parameters[low] > _CLOSE * parameters[-1]:
            middle = self.order.holding((parameters[low] + parameters[high]) / 2)
            middle = min(max(middle, low + 1), high - 1)
            point, _ = self.measured(examples, reference, allowed, middle, "first")
            points.append(point)
            low, high = (low, middle) if point.within else (middle, high)
        return points

    def decided(
        self, examples: Examples, reference: np.ndarray, allowed: float, points: list[Point]
    ) -> tuple[list[Point], Measured | None]:
        """Tests sizes down to the first half's; those that were tested, and what the last that passed does."""
        smallest = min((point.parts for point in points if point.within), default=len(self.order) - 1)
        wanted = (self.order.holding(times * self.order.parameters[smallest]) for times in reversed(_LADDER))
        tested: list[Point] = []
        passed: Measured | None = None
        for count in dict.fromkeys(min(count, len(self.order) - 1) for count in wanted):
            point, found = self.measured(examples, reference, allowed, count, "second")
            tested.append(point)
            if not point.within:
                break
            passed = found
        return tested, passed

    def cut(self, count: int, whole: Adapter) -> Adapter:
        """The adapter with so many parts, as it is saved."""
        kept = {path: own for path, own in self.order.kept(count, list(self.parts)).items() if own}
        ranks = {path: len(own) for path, own in kept.items()}
        rank = max(set(ranks.values()), key=list(ranks.values()).count, default=whole.spec.rank)
        pattern = {exactly(path): own for path, own in ranks.items() if own != rank}
        spec = LoraSpec(
            targets=tuple(kept) or whole.spec.targets,
            rank=rank,
            alpha=float(rank),
            rank_pattern=pattern,
            alpha_pattern={key: float(own) for key, own in pattern.items()},
            **{name: getattr(whole.spec, name) for name in _CARRIED},
        )
        sites = {path: self.parts[path].only(own) for path, own in kept.items()}
        return Adapter(spec, sites, whole.modules, tokens=whole.tokens)


_CARRIED = ("dropout", "modules_to_save", "new_tokens", "trained_tokens")
