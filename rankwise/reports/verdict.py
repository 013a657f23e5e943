"""One sentence that says whether it worked, and the reasons to believe it no further than it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rankwise.reports.numbers import count, counted, decimal, decimals_for, percent, perplexity, signed
from rankwise.reports.paired import pair
from rankwise.reports.run import AdapterLoss, Evaluation, Run
from rankwise.reports.words import Words, accuracy

Kind = Literal["better", "worse", "unclear", "unmeasured"]

# With five documents even five improvements out of five are a 6 % coincidence (sign test, two sides); six are 3 %.
FEWEST_DOCUMENTS = 6
FEW_DOCUMENTS = 30

STOPS = {
    "finished": "ran to its end",
    "early": "stopped early, because the validation loss no longer fell",
    "diverged": "was stopped because it diverged",
    "not finite": "was stopped because its numbers were no longer finite",
    "interrupted": "was interrupted",
}


@dataclass(frozen=True)
class Verdict:
    kind: Kind
    sentence: str
    caveats: tuple[str, ...] = ()


def judge(run: Run) -> Verdict:
    """The verdict on the run's first adapter; the page's table has the others."""
    if run.evaluation is None:
        return _unmeasured(run)
    adapter = run.evaluation.adapters[0]
    kind = judge_adapter(run.evaluation, adapter)
    sentence = _failure(run) + _sentence(run.evaluation, adapter, kind, Words.of(run))
    return Verdict(kind, sentence, tuple(_caveats(run, run.evaluation)))


def _failure(run: Run) -> str:
    """What comes before anything else is said: the adapter is that of a training that went wrong."""
    training = run.record.training
    if training is None or training.stopped not in ("diverged", "not finite"):
        return ""
    best = (
        f"; the {run.record.noun} is that of step {count(training.best_step)}" if training.best_step is not None else ""
    )
    return f"Training {stop(training.stopped)} after {counted(training.steps, 'step')}{best}. "


def judge_adapter(evaluation: Evaluation, adapter: AdapterLoss) -> Kind:
    """What the interval of the paired difference allows to say."""
    if evaluation.documents < FEWEST_DOCUMENTS:
        return "unclear"
    if adapter.delta.high < 0:
        return "better"
    return "worse" if adapter.delta.low > 0 else "unclear"


def stop(stopped: str) -> str:
    """How the training ended, in words; an ending unknown to this version is quoted."""
    return STOPS.get(stopped, f"stopped: {stopped}")


def _sentence(evaluation: Evaluation, adapter: AdapterLoss, kind: Kind, words: Words) -> str:
    delta, places = adapter.delta, decimals_for((adapter.delta.high - adapter.delta.low) / 2)
    tuned = "tuned" if len(evaluation.adapters) == 1 else f"tuned ({adapter.name})"
    confidence = f"{100 * evaluation.confidence:g} %"
    documents = counted(evaluation.documents, "unseen document")
    ends = _ends(evaluation, adapter, words)
    if evaluation.documents < FEWEST_DOCUMENTS:
        return (
            f"Too few documents to tell: {tuned} and {words.reference} differ by "
            f"{signed(delta.mean, places)} {words.nats} on {documents}, {ends}."
        )
    if paired := pair(evaluation.per_document, adapter.name):
        ends += f"; better on {percent(paired.better, paired.documents)} of them"
    if kind == "unclear":
        return (
            f"No measurable difference between {tuned} and {words.reference} on {documents}: the {confidence} interval "
            f"of the difference, {signed(delta.low, places)} … {signed(delta.high, places)} {words.nats}, includes "
            f"zero; {ends}."
        )
    small, large = sorted((abs(delta.low), abs(delta.high)))
    return (
        f"T{tuned[1:]} is {kind} than {words.against} by {decimal(abs(delta.mean), places)} {words.nats} ({confidence} "
        f"interval "
        f"{decimal(small, places)} … {decimal(large, places)}) on {documents}, {ends}."
    )


def _ends(evaluation: Evaluation, adapter: AdapterLoss, words: Words) -> str:
    """What the loss comes to, in a measure that says more."""
    if not words.classes:
        return f"perplexity {perplexity(evaluation.base.loss)} → {perplexity(adapter.loss)}"
    return f"accuracy {accuracy(evaluation.base, interval=False)} → {accuracy(adapter)}"


def _caveats(run: Run, evaluation: Evaluation) -> list[str]:
    caveats = []
    if FEWEST_DOCUMENTS <= evaluation.documents < FEW_DOCUMENTS:
        caveats.append(
            f"With {evaluation.documents} documents the interval itself is uncertain; "
            f"{FEW_DOCUMENTS} or more make it trustworthy."
        )
    valid = run.record.data.valid if run.record.data else None
    # Step 0 is the untrained adapter: it is looked at, but there is nothing to choose yet.
    looks = max((sum(look.step > 0 for look in curve.validations) for curve in run.curves.values()), default=0)
    chosen = run.record.training is not None and run.record.training.best_step is not None
    if chosen and looks > 1 and valid and run.record.data and run.record.data.test is None:
        caveats.append(
            f"The comparison was made on the validation documents, which also chose the best of {looks} checkpoints: "
            f"that makes the figure slightly too kind. Documents of their own (--test) would not."
        )
    return caveats + _further(run) + _skipped(run)


def _further(run: Run) -> list[str]:
    """An adapter that was trained before may know documents that this run held back."""
    further = any(setting.name == "continue_from" and setting.value is not None for setting in run.record.settings)
    caveat = (
        "An adapter was trained further (--continue-from): documents that this run held back may have been learnt "
        "before, which would make the figure too kind."
    )
    return [caveat] if further else []


def _skipped(run: Run) -> list[str]:
    skipped = run.record.training.skipped_steps if run.record.training else 0
    return [f"Skipped for numbers that were not finite: {counted(skipped, 'step')}."] if skipped else []


def _unmeasured(run: Run) -> Verdict:
    training = run.record.training
    ending = f"; training {stop(training.stopped)} after {counted(training.steps, 'step')}" if training else ""
    sentence = f"Not compared with the base: this folder holds no evaluation{ending}."
    caveat = (
        f"Whether the {run.record.noun} helps on unseen documents is not known: rankwise train measures that when it "
        f"has two or more validation documents."
    )
    return Verdict("unmeasured", sentence, (caveat, *_skipped(run)))
