"""report.html of a search: what is enough, the numbers it rests on, and every step that led there.  No network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rankwise.reports import numbers
from rankwise.reports.folder import REPORT, place
from rankwise.reports.page import Tile, environment
from rankwise.reports.run import Delta
from rankwise.reports.search import STEPS, Confirmed, Search
from rankwise.reports.search_plots import cost_plot, places, rank_plot, rates_plot, share
from rankwise.reports.search_reader import read_search
from rankwise.reports.search_rows import allocation_plot, confirm_plot, methods_plot, targets_plot
from rankwise.reports.search_traces import curves_plot, ranks_plot
from rankwise.reports.words import Words
from rankwise.tasks import DEFAULT, TASKS

# Classes of the stylesheet; `unclear` is that of the run report where nobody can tell.
LOOKS = {"recommended": "recommended", "provisional": "provisional", "cannot tell": "unclear"}
MOST_VALUES = 8  # singular values of a layer that are written out
LEARNING = ("noise", "rate", "targets", "ladder", "methods", "confirm")
TITLES = {
    "count": "What there is to learn from",
    "noise": "How small a difference can be seen",
    "rate": "Which learning rate",
    "targets": "Which layers",
    "ladder": "Which rank",
    "methods": "Whether another method is better",
    "allocation": "Whether some layers want more rank",
    "confirm": "Whether it holds on new documents",
    "ship": "What the adapter can do without",
}


def write_search_report(folder: Path) -> Path:
    """Writes `report.html` beside `search.json` and says where.

    Raises:
        RunFolderError: the folder cannot be read; lists all that is missing or malformed.
    """
    folder = Path(folder).resolve()
    return place(folder, REPORT, render(read_search(folder), folder.name))


def render(search: Search, name: str) -> str:
    """The whole page."""
    task = TASKS.get(search.task, TASKS[DEFAULT])
    words = Words(task.unit, task.item, classes=task.classifies)
    unit, rate = words.unit, search.rate
    base = search.count.base.choose if search.count else None
    return (
        environment()
        .get_template("search_page.html")
        .render(
            name=name,
            search=search,
            words=words,
            found=search.recommendation,
            looks=LOOKS[search.recommendation.kind] if search.recommendation else "unmeasured",
            tiles=_tiles(search, words),
            titles=TITLES,
            absent={step: _absent(search, step) for step in STEPS},
            rates=rates_plot(rate, base, search.full_run.steps, unit) if rate else None,
            targets=targets_plot(search.targets, unit) if search.targets else None,
            ranks=rank_plot(search, unit),
            methods=methods_plot(search.methods, unit) if search.methods else None,
            confirmed=confirm_plot(search.confirm, unit) if search.confirm else None,
            allocated=allocation_plot(search.allocation, unit) if search.allocation else None,
            given=ranks_plot(search.allocation.ranks, given=True) if search.allocation else None,
            kept=ranks_plot(search.ship.ranks) if search.ship else None,
            cost=cost_plot(search.cost) if rate else None,
            curves={step: curves_plot(search, step, unit) for step in LEARNING},
            share=share,
            places=places,
            span=span,
            MOST_VALUES=MOST_VALUES,
        )
    )


def span(delta: Delta, *, sign: Callable[[float, int], str] = numbers.signed) -> str:
    """`−0.0042 … +0.0074`."""
    decimals = places(delta)
    return f"{sign(delta.low, decimals)} … {sign(delta.high, decimals)}"


def _absent(search: Search, step: str) -> str:
    """Why there is nothing to say of a step; empty where there is."""
    if getattr(search, step) is not None or (step == "ladder" and search.truncation is not None):
        return ""
    last = search.last
    if last is None or STEPS.index(step) > STEPS.index(last):
        return f"Not run: the search ended {f'with the step “{last}”' if last else 'before its first step'}."
    why = {
        "targets": "the express budget compares no layers"
        if search.budget == "express"
        else "the layers were named, so that there was nothing to compare",
        "methods": "no other method was put on the list (--also)",
        "allocation": "ranks by layer were not asked for (--allocate)",
    }
    return f"Not run: {why.get(step, 'it is not in search.json')}."


def _tiles(search: Search, words: Words) -> list[Tile]:
    """The numbers that the sentence rests on."""
    tiles = []
    if (judged := _judged(search)) is not None:
        tiles += _confirmed_tiles(search, judged, words)
    elif search.noise is not None:
        gain, length = search.noise.gain, share(search.noise.share)
        label = f"{words.nats} gained over the base at {length}, {span(gain)}"
        tiles.append(Tile(numbers.signed(gain.mean, places(gain)), label))
    for point in search.ladder.points if search.ladder else ():
        if search.ladder and point.rank == search.ladder.chosen:
            often = numbers.percent(round(1000 * point.chosen_in), 1000)
            tiles.append(Tile(often, f"of resampled ladders choose rank {point.rank}"))
    trials = numbers.counted(search.cost.trials, "trial")
    grid = f"; a plain grid takes {search.cost.grid:g}" if search.rate else ""
    tiles.append(Tile(f"{search.cost.runs:.3g}", f"full runs spent on {trials}{grid}"))
    tiles.append(Tile(numbers.duration(search.cost.seconds), "of training and measuring"))
    return tiles


def _judged(search: Search) -> Confirmed | None:
    """The rank that was chosen, also where it did not hold."""
    points = search.confirm.points if search.confirm else ()
    return next((point for point in points if search.confirm and point.rank == search.confirm.chosen), None)


def _confirmed_tiles(search: Search, judged: Confirmed, words: Words) -> list[Tile]:
    """What the recommended rank gains, and what the chosen one loses against the best."""
    assert search.confirm is not None
    kept = search.recommendation.rank if search.recommendation else judged.rank
    gain = next((point.gain for point in search.confirm.points if point.rank == kept), judged.gain)
    label, delta = f"{words.nats} gained over the base by rank {kept}, {span(gain)}", judged.delta
    tiles = [Tile(numbers.signed(gain.mean, places(gain)), label)]
    reference = next((point.rank for point in search.confirm.points if point.delta is None), None)
    if delta is not None and reference is not None:
        allowed = numbers.decimal(search.confirm.tolerance, places(delta))
        label = (
            f"{words.nats} lost by rank {judged.rank} against rank {reference}, {span(delta)}; {allowed} are allowed"
        )
        tiles.append(Tile(numbers.signed(delta.mean, places(delta)), label))
    return tiles
