"""The nouns of search.json: what `rankwise search` asked, and what it measured.

A step that was not run is None.  Losses are nats per judged item (a token, a document); a difference is candidate −
reference: negative is better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from rankwise.reports.run import Delta
from rankwise.reports.search_allocation import Allocation

Step = Literal["count", "noise", "rate", "targets", "ladder", "methods", "allocation", "confirm", "ship"]
STEPS: tuple[Step, ...] = get_args(Step)

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Judged = Literal["best", "not worse", "worse", "cannot tell", "failed"]


@dataclass(frozen=True)
class Bounded(Delta):
    """`low` and `high` end the two-sided 95 % interval, `upper` is the one-sided 95 % bound, by which is decided."""

    upper: FiniteFloat


@dataclass(frozen=True)
class Model:
    name: str
    fingerprint: str


@dataclass(frozen=True)
class Part:
    """Documents: learnt from, chosen by, or confirmed on."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    supervised: NonNegativeInt


@dataclass(frozen=True)
class Parts:
    train: Part
    choose: Part
    confirm: Part


@dataclass(frozen=True)
class FullRun:
    steps: PositiveInt
    tokens: NonNegativeInt


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class BaseLosses:
    choose: FiniteFloat
    confirm: FiniteFloat


@dataclass(frozen=True)
class Count:
    targets: str
    parameters_per_rank: NonNegativeInt
    base: BaseLosses
    ranks: tuple[PositiveInt, ...]


@dataclass(frozen=True)
class Noise:
    """Seeds of one candidate; `detectable`: the smallest difference that two trainings would show."""

    name: str
    rank: PositiveInt
    share: Share
    losses: tuple[FiniteFloat, ...]
    deviation: FiniteFloat
    detectable: FiniteFloat
    gain: Delta
    tolerance: Tolerance


@dataclass(frozen=True)
class RatePoint:
    lr: Rate
    status: str
    loss: FiniteFloat | None
    delta: Delta | None
    kept: bool


@dataclass(frozen=True)
class Rung:
    share: Share
    points: Annotated[tuple[RatePoint, ...], Field(min_length=1)]

    @property
    def learnt(self) -> list[tuple[float, float, RatePoint]]:
        """Rate, loss and point of those that came to one, by rate."""
        found = [(point.lr, point.loss, point) for point in self.points if point.loss is not None]
        return sorted(found, key=lambda one: one[0])


@dataclass(frozen=True)
class Rates:
    """`interior`: the best has a worse neighbour on either side, the higher one perhaps in a shorter run; `alike`: not
    measurably worse than the best.
    """

    rank: PositiveInt
    best: Rate
    interior: bool
    alike: tuple[Rate, ...]
    rungs: Annotated[tuple[Rung, ...], Field(min_length=1)]


@dataclass(frozen=True)
class TargetsPoint:
    targets: str
    rank: PositiveInt
    parameters: NonNegativeInt
    status: str
    loss: FiniteFloat | None
    delta: Delta | None
    verdict: Judged


@dataclass(frozen=True)
class Targets:
    best: str
    chosen: str
    points: tuple[TargetsPoint, ...]


@dataclass(frozen=True)
class LadderPoint:
    """`chosen_in`: the share of resamples that choose this rank."""

    rank: PositiveInt
    parameters: NonNegativeInt
    status: str
    loss: FiniteFloat | None
    delta: Bounded | None
    verdict: Judged
    chosen_in: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Ladder:
    best: PositiveInt
    chosen: PositiveInt
    tolerance: Tolerance
    seeds: PositiveInt
    points: tuple[LadderPoint, ...]


@dataclass(frozen=True)
class CutPoint:
    rank: PositiveInt
    loss: FiniteFloat
    delta: Bounded
    within: bool


@dataclass(frozen=True)
class Truncation:
    """One run of `rank`, cut to each smaller one; differences are to that run."""

    rank: PositiveInt
    chosen: PositiveInt | None
    tolerance: Tolerance
    points: Annotated[tuple[CutPoint, ...], Field(min_length=1)]


@dataclass(frozen=True)
class NestedPoint:
    rank: PositiveInt
    loss: FiniteFloat
    delta: Bounded | None


@dataclass(frozen=True)
class Nested:
    """One run of `rank`, of which every smaller one is a part that learns too; differences are to that rank alone."""

    rank: PositiveInt
    points: Annotated[tuple[NestedPoint, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Method:
    name: str
    status: str
    loss: FiniteFloat | None
    delta: Delta | None
    verdict: Literal["better", "worse", "cannot tell", "failed"]


@dataclass(frozen=True)
class Methods:
    points: tuple[Method, ...]


@dataclass(frozen=True)
class Confirmed:
    rank: PositiveInt
    loss: FiniteFloat
    delta: Bounded | None
    verdict: Judged
    gain: Delta


@dataclass(frozen=True)
class Confirm:
    """On documents that no choice looked at; differences are to the best rank of the ladder, `failed` has none."""

    seeds: PositiveInt
    tolerance: Tolerance
    chosen: PositiveInt
    verdict: Literal["not worse", "worse", "cannot tell", "alone"]
    points: Annotated[tuple[Confirmed, ...], Field(min_length=1)]
    failed: tuple[PositiveInt, ...] = ()


@dataclass(frozen=True)
class Sizes:
    whole: PositiveInt
    compressed: NonNegativeInt


@dataclass(frozen=True)
class ShippedLosses:
    base: FiniteFloat
    whole: FiniteFloat
    compressed: FiniteFloat


@dataclass(frozen=True)
class Control:
    """A fresh adapter trained at the ranks that are left; `delta` is to what is left, on documents to confirm on."""

    status: str
    loss: FiniteFloat | None
    delta: Bounded | None
    kept: Literal["compressed", "trained"]


@dataclass(frozen=True)
class Ship:
    """The adapter that is left.

    Attributes:
        control: training at its ranks; None where that was left out, `no_control` says why.
        spectrum: singular values of the whole one at each site, the largest first.
    """

    parameters: Sizes
    losses: ShippedLosses
    tolerance: Tolerance
    ranks: dict[str, NonNegativeInt]
    control: Control | None = None
    no_control: str = ""
    spectrum: dict[str, tuple[FiniteFloat, ...]] = field(default_factory=dict)


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Cost:
    """`runs` and `grid` in runs of full length; the grid trains every rate with every rank at full length."""

    runs: Tolerance
    trials: NonNegativeInt
    grid: Tolerance
    seconds: Tolerance


@dataclass(frozen=True)
class Trial:
    """A candidate trained with a seed; `step`: the question that needed it first."""

    name: str
    step: Literal["noise", "rate", "targets", "ladder", "methods", "allocation", "confirm", "ship"]
    seed: int
    share: Share
    status: str
    loss: FiniteFloat | None
    curve: tuple[tuple[NonNegativeInt, float | None], ...]


@dataclass(frozen=True)
class Recommendation:
    kind: Literal["recommended", "provisional", "cannot tell"]
    sentence: str
    surer: str
    rank: PositiveInt
    alpha: FiniteFloat
    lr: Rate
    targets: str
    command: str
    rank_pattern: dict[str, PositiveInt] = field(default_factory=dict)
    invariants: dict[str, FiniteFloat] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """search.json."""

    schema: int
    task: str
    model: Model
    budget: str
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    seconds: FiniteFloat
    data: Parts
    full_run: FullRun
    cost: Cost
    trials: tuple[Trial, ...]
    count: Count | None = None
    noise: Noise | None = None
    rate: Rates | None = None
    targets: Targets | None = None
    ladder: Ladder | None = None
    truncation: Truncation | None = None
    nested: Nested | None = None
    methods: Methods | None = None
    allocation: Allocation | None = None
    confirm: Confirm | None = None
    ship: Ship | None = None
    recommendation: Recommendation | None = None

    @property
    def last(self) -> str | None:
        """The last step that was run; cutting one adapter is a ladder of a kind."""
        run = [step for step in STEPS if getattr(self, step) is not None or (step == "ladder" and self.truncation)]
        return run[-1] if run else None
