"""report.html: one file that a sceptic accepts and anyone understands.  No network, no script."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rankwise.reports import numbers
from rankwise.reports.folder import REPORT, place
from rankwise.reports.paired import Paired, pair
from rankwise.reports.plots import compression_plot, documents_plot, interval_plot, loss_plot, norm_plot, rate_plot
from rankwise.reports.reader import read_run
from rankwise.reports.run import AdapterLoss, Evaluation, Run
from rankwise.reports.series import training_losses
from rankwise.reports.sites import group_sites
from rankwise.reports.start import started
from rankwise.reports.verdict import Kind, judge, judge_adapter, stop
from rankwise.reports.words import Words, accuracy

# A model that never stops talking must not make a page that never stops loading.
LONGEST_SAMPLE = 12_000
MOST_EVENTS = 20


@dataclass(frozen=True)
class Tile:
    """One large number with its meaning below."""

    value: str
    label: str


@dataclass(frozen=True)
class Comparison:
    """One adapter's row beside the base's."""

    adapter: AdapterLoss
    kind: Kind
    places: int
    paired: Paired | None


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run's folder and says where.

    Raises:
        RunFolderError: the folder cannot be read; lists all that is missing or malformed.
    """
    run = read_run(folder)
    return place(run.folder, REPORT, render(run))


def render(run: Run) -> str:
    """The whole page."""
    verdict, words = judge(run), Words.of(run)
    comparisons = _comparisons(run.evaluation) if run.evaluation else ()
    paired = comparisons[0].paired if comparisons else None
    return (
        environment()
        .get_template("page.html")
        .render(
            run=run,
            record=run.record,
            training=run.record.training,
            evaluation=run.evaluation,
            verdict=verdict,
            words=words,
            tiles=_tiles(run, words),
            loss=loss_plot(run),
            interval=interval_plot(run.evaluation, words) if run.evaluation else None,
            comparisons=comparisons,
            documents=documents_plot(paired, words) if paired else None,
            compression=compression_plot(run.record.compression, words) if run.record.compression else None,
            rate=rate_plot(run),
            norm=norm_plot(run),
            sites=group_sites(run.record.sites),
            start=started(run.record.start, len(run.record.sites)) if run.record.start else None,
        )
    )


@cache
def environment() -> Environment:
    """Templates of this room; whatever they are given is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "accuracy": accuracy,
        "anything": numbers.anything,
        "count": numbers.count,
        "counted": numbers.counted,
        "decimal": numbers.decimal,
        "duration": numbers.duration,
        "perplexity": numbers.perplexity,
        "plain": numbers.plain,
        "signed": numbers.signed,
        "size": numbers.size,
        "stop": stop,
        "unbroken": numbers.unbroken,
    }
    environment.globals |= {
        "percent": numbers.percent,
        "LONGEST_SAMPLE": LONGEST_SAMPLE,
        "MOST_EVENTS": MOST_EVENTS,
    }
    return environment


def _comparisons(evaluation: Evaluation) -> tuple[Comparison, ...]:
    return tuple(
        Comparison(
            adapter,
            judge_adapter(evaluation, adapter),
            numbers.decimals_for((adapter.delta.high - adapter.delta.low) / 2),
            pair(evaluation.per_document, adapter.name),
        )
        for adapter in evaluation.adapters
    )


def _tiles(run: Run, words: Words) -> list[Tile]:
    tiles = _measured_tiles(run.evaluation, words) if run.evaluation else _unmeasured_tiles(run)
    if training := run.record.training:
        speed = numbers.count(round(training.tokens_per_second))
        steps = numbers.counted(training.steps, "step")
        tiles.append(Tile(numbers.duration(training.seconds), f"training, {steps} at {speed} tokens/s"))
    sites = numbers.counted(len(run.record.sites), "layer")
    where = ", all there are" if run.record.noun == "model" else f" at {sites}"
    tiles.append(Tile(numbers.short_count(run.record.parameters), f"trained parameters{where}"))
    return tiles


def _measured_tiles(evaluation: Evaluation, words: Words) -> list[Tile]:
    adapter, *_ = evaluation.adapters
    delta, places = adapter.delta, numbers.decimals_for((adapter.delta.high - adapter.delta.low) / 2)
    interval = f"{numbers.signed(delta.low, places)} … {numbers.signed(delta.high, places)}"
    tiles = [
        Tile(numbers.signed(delta.mean, places), f"{words.nats} against {words.against}, {interval}"),
        _second_tile(evaluation, adapter, words),
    ]
    if paired := pair(evaluation.per_document, adapter.name):
        share = numbers.percent(paired.better, paired.documents)
        tiles.append(Tile(share, f"of unseen documents better: {paired.better:,} of {paired.documents:,}"))
    return tiles


def _second_tile(evaluation: Evaluation, adapter: AdapterLoss, words: Words) -> Tile:
    """What the loss comes to, in a measure that says more."""
    if adapter.accuracy is None:
        ends = f"{numbers.perplexity(evaluation.base.loss)} → {numbers.perplexity(adapter.loss)}"
        return Tile(ends, f"perplexity, {words.reference} → tuned")
    f1 = "" if adapter.macro_f1 is None else f"; macro-F1 {numbers.decimal(adapter.macro_f1)}"
    before = accuracy(evaluation.base, interval=False)
    return Tile(accuracy(adapter, interval=False), f"accuracy, {words.reference} {before}{f1}")


def _unmeasured_tiles(run: Run) -> list[Tile]:
    tiles = []
    for name, curve in run.curves.items():
        smoothed = training_losses(curve)[1].ys
        if smoothed:
            whose = f" of {name}" if len(run.curves) > 1 else ""
            ends = f"{numbers.decimal(smoothed[0], 2)} → {numbers.decimal(smoothed[-1], 2)}"
            tiles.append(Tile(ends, f"training loss{whose}, smoothed, first → last"))
    return tiles
