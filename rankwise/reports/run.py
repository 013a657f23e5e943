"""The nouns of a finished or interrupted run, as its folder records them.

file              noun                              without it
rankwise.json     Record                            there is no report
metrics.jsonl     Step, Validation, Event           no curves
evaluation.json   Evaluation                        no verdict
samples.json      Sample                            no samples

Losses are nats per judged item (a token, a document) unless a field says otherwise; a difference is adapter − base:
negative is better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from rankwise.reports.numbers import decimals_for

# Law 10: names are opaque and closed, so that they can stand in a file name, a plot or a table without being read.
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


@dataclass(frozen=True)
class Spec:
    """The four axes and the sites asked for; the words are those of `adapters/spec.py`, open to later forms."""

    rank: PositiveInt
    alpha: FiniteFloat
    targets: str | tuple[str, ...]
    form: str
    scaling: str
    dropout: FiniteFloat
    init: str
    exclude: str | tuple[str, ...] = ()
    layers: str = ""
    rank_pattern: dict[str, PositiveInt] = field(default_factory=dict)
    alpha_pattern: dict[str, FiniteFloat] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    """In the place of a spec where all weights were trained, and there is no adapter."""

    form: Literal["full"]


@dataclass(frozen=True)
class Base:
    name: str
    fingerprint: str
    storage: str = "dense"


@dataclass(frozen=True)
class Site:
    rank: PositiveInt
    scale: FiniteFloat
    alpha: FiniteFloat


@dataclass(frozen=True)
class Setting:
    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class SourceFile:
    path: str
    sha256: str


@dataclass(frozen=True)
class Split:
    """What one half of the data came to after reading, templating and fitting."""

    files: tuple[SourceFile, ...]
    documents: NonNegativeInt
    tokens: NonNegativeInt
    supervised: NonNegativeInt
    truncated: NonNegativeInt = 0
    dropped: dict[str, NonNegativeInt] = field(default_factory=dict)
    held_back: bool = False  # a part of the training files; what was cut or dropped is counted with them


@dataclass(frozen=True)
class Data:
    train: Split
    valid: Split | None = None
    test: Split | None = None

    @property
    def splits(self) -> list[tuple[str, Split]]:
        """Those that there are, under the names that pages give them."""
        named = (("training", self.train), ("validation", self.valid), ("test", self.test))
        return [(name, split) for name, split in named if split is not None]


@dataclass(frozen=True)
class Template:
    digest: str


@dataclass(frozen=True)
class Training:
    steps: NonNegativeInt
    epochs: FiniteFloat
    tokens: NonNegativeInt
    supervised: NonNegativeInt
    seconds: FiniteFloat
    tokens_per_second: FiniteFloat
    stopped: str
    peak_memory_bytes: NonNegativeInt | None = None
    best_step: NonNegativeInt | None = None
    skipped_steps: NonNegativeInt = 0


@dataclass(frozen=True)
class Start:
    """What it took to begin, where that was computed; the words are those of `engine/begin.py`."""

    init: str
    documents: NonNegativeInt
    seconds: FiniteFloat
    changed: NonNegativeInt
    unsettled: NonNegativeInt
    unreached: NonNegativeInt


@dataclass(frozen=True)
class Class:
    """One of those that are told apart; `count`: documents learnt from."""

    name: str
    label: int | str
    count: NonNegativeInt | None = None


@dataclass(frozen=True)
class Record:
    """rankwise.json.  An adapter saved outside a run has no facts: everything from `versions` on may be absent."""

    schema: int
    spec: Spec | Whole
    base: Base
    digest: str
    parameters: NonNegativeInt
    sites: dict[str, Site]
    modules: tuple[str, ...] = ()
    task: str = "causal-lm"
    classes: tuple[Class, ...] = ()
    tokens: dict[str, tuple[NonNegativeInt, ...]] = field(default_factory=dict)
    nested: tuple[NonNegativeInt, ...] = ()
    new_tokens: dict[str, NonNegativeInt] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    data: Data | None = None
    template: Template | None = None
    training: Training | None = None
    start: Start | None = None
    compression: Compression | None = None
    command: str | None = None

    @property
    def noun(self) -> str:
        """What was made: an adapter, or a model."""
        return "model" if isinstance(self.spec, Whole) else "adapter"


@dataclass(frozen=True)
class Size:
    """How much of an adapter was kept, and what that cost: `delta` is to the whole adapter."""

    parameters: NonNegativeInt
    delta: Delta
    within: bool


@dataclass(frozen=True)
class Compression:
    """What `rankwise compress` measured; sizes of the first half chose, those of the second decided."""

    worth: str
    tolerance: float
    parameters: dict[str, PositiveInt]
    documents: dict[str, PositiveInt]
    delta: Delta
    first: tuple[Size, ...]
    second: tuple[Size, ...]

    @property
    def kept(self) -> float:
        """The share of the whole adapter's parameters."""
        return self.parameters["compressed"] / self.parameters["whole"]

    @property
    def decimals(self) -> int:
        """That show two digits of how far the bound is from the mean."""
        return decimals_for(self.delta.high - self.delta.mean)


@dataclass(frozen=True)
class Step:
    """One optimiser step.  Loss and norm may be missing or not finite: that is what a diverged run looks like."""

    step: NonNegativeInt
    adapter: AdapterName
    supervised: NonNegativeInt
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True)
class Validation:
    """A look at the validation documents while training."""

    step: NonNegativeInt
    adapter: AdapterName
    loss: float | None
    documents: PositiveInt


@dataclass(frozen=True)
class Event:
    """Something worth telling: a skipped step, a resume, a checkpoint."""

    step: NonNegativeInt
    what: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """All that was measured of one adapter while it trained, in order of steps, each step once."""

    steps: tuple[Step, ...]
    validations: tuple[Validation, ...]


@dataclass(frozen=True)
class Share:
    """A share of documents with its 95 % interval."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


@dataclass(frozen=True)
class ShareDelta:
    """Adapter − base, positive is better, and the chance of such a difference where both are alike."""

    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    mcnemar_p: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class BaseLoss:
    """Of the base, or of what stands in its place; accuracy and macro-F1 where there are classes."""

    loss: FiniteFloat
    accuracy: Share | None = None
    macro_f1: FiniteFloat | None = None


@dataclass(frozen=True)
class Delta:
    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


@dataclass(frozen=True)
class AdapterLoss:
    name: AdapterName
    loss: FiniteFloat
    delta: Delta
    accuracy: Share | None = None
    macro_f1: FiniteFloat | None = None
    accuracy_delta: ShareDelta | None = None


@dataclass(frozen=True)
class PerDocument:
    """Sums of nats over each document's supervised tokens, base and adapters in the same order of documents."""

    tokens: tuple[PositiveInt, ...]
    base: tuple[FiniteFloat, ...]
    adapters: dict[str, tuple[FiniteFloat, ...]]


@dataclass(frozen=True)
class Evaluation:
    """Base and adapters on the same unseen documents, paired."""

    documents: PositiveInt
    tokens: PositiveInt
    base: BaseLoss
    adapters: Annotated[tuple[AdapterLoss, ...], Field(min_length=1)]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    per_document: PerDocument | None = None
    reference: str = "base"
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One prompt answered before and after training.  Untrusted text, all of it."""

    prompt: str
    before: str
    after: str
    reference: str | None = None


@dataclass(frozen=True)
class Run:
    """A run's folder, read and checked."""

    folder: Path
    record: Record
    curves: dict[str, Curve]
    events: tuple[Event, ...]
    evaluation: Evaluation | None
    samples: tuple[Sample, ...]

    @property
    def name(self) -> str:
        return self.folder.name
