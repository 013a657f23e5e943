"""The pictures of a search: which rank, which rate, and what it cost.  Each is one question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from rankwise.reports.numbers import counted, decimal, decimals_for, plain, signed
from rankwise.reports.plots import EVEN_STEPS, Key, Plot, difference, label
from rankwise.reports.run import Delta
from rankwise.reports.search import Bounded, Cost, Rates, Rung, Search
from rankwise.reports.svg import NARROW, WIDE, colour, picture

ROLE = {"best": "tuned", "not worse": "tuned", "better": "tuned", "worse": "worse", "failed": "worse"}
LONGEST_NAME = 34  # of a row: as much as a narrow screen holds
_WIDEST = 8  # tolerances above zero that a frame shows at most, beyond what is needed to see the choice
DASHED = (0, (5, 4))
_OF_NESTED = {"color": colour("series-2"), "linewidth": 1, "markersize": 3}


def role(verdict: str) -> str:
    """The colour of a verdict; grey for what cannot be told."""
    return ROLE.get(verdict, "muted")


def share(value: float) -> str:
    """`1/8 of a full run`."""
    if value == 1:
        return "a full run"
    nearest = Fraction(value).limit_denominator(16)
    return f"{nearest} of a full run" if nearest else f"{100 * value:.1f} % of a full run"


def short(name: str, most: int = LONGEST_NAME) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def places(delta: Delta) -> int:
    """Decimals that show two digits of the interval's half-width."""
    return decimals_for((delta.high - delta.low) / 2)


# ── which rank ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Mark:
    """A rank's difference to the best; the best has none."""

    rank: int
    delta: Bounded | None
    role: str

    @property
    def mean(self) -> float:
        return self.delta.mean if self.delta is not None else 0.0

    @property
    def high(self) -> float:
        return max(self.delta.high, self.delta.upper) if self.delta is not None else 0.0


def rank_plot(search: Search, unit: str) -> Plot | None:
    """The difference to the best by rank; beside it, or alone, what one adapter loses when it is cut."""
    ladder, cut = search.ladder, search.truncation
    if ladder is not None:
        marks = [
            Mark(point.rank, point.delta, role(point.verdict)) for point in ladder.points if point.loss is not None
        ]
        chosen, tolerance, against = ladder.chosen, ladder.tolerance, f"rank {ladder.best}, the best"
    elif cut is not None:
        marks = [
            Mark(point.rank, point.delta if point.rank != cut.rank else None, "tuned" if point.within else "muted")
            for point in cut.points
        ]
        chosen, tolerance, against = cut.chosen or cut.rank, cut.tolerance, f"the same adapter at rank {cut.rank}"
    else:
        return None
    beside = [(point.rank, point.delta.mean) for point in cut.points] if ladder is not None and cut is not None else []
    cut_at, cut_to = [math.log2(x) for x, _ in beside], [y for _, y in beside]
    nested = _nested_to(search)
    bottom, top = _rank_frame(marks, tolerance, chosen)

    def draw(axes: Any) -> None:
        axes.axhspan(bottom, tolerance, color=colour("tuned"), alpha=0.09, linewidth=0)
        axes.axhline(0, color=colour("ink"), linewidth=1.2)
        axes.axhline(tolerance, color=colour("tuned"), linewidth=1.2, linestyle=DASHED)
        axes.plot(cut_at, cut_to, "-o", color=colour("train"), linewidth=1, markersize=3)
        axes.plot([math.log2(x) for x, _ in nested], [y for _, y in nested], "-s", **_OF_NESTED)
        for mark in marks:
            _draw_mark(axes, mark, top, strong=mark.rank == chosen)
        axes.set_ylim(bottom, top)
        _ranks_below(axes, sorted({mark.rank for mark in marks} | {x for x, _ in beside}))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=EVEN_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: difference(value)))
        axes.set_title(f"nats per {unit}, against {against}", loc="left", color=colour("muted"), fontsize=12)

    title = f"Difference in loss by rank; rank {chosen} is the smallest that is enough"
    keys = _rank_keys(marks, tolerance, ladder is not None, cut.rank if beside and cut is not None else None)
    if nested:
        keys = (
            *keys[:-2],
            Key("line", "series-2", f"one nested adapter of rank {nested[-1][0]}, against {against}"),
            *keys[-2:],
        )
    lines = {"cut": beside, "nested": nested}
    beyond = {name: [f"{signed(y)} at rank {x}" for x, y in line if y > top] for name, line in lines.items()}
    note = " ".join(f"Outside the frame, of the {n} adapter: {', '.join(out)}." for n, out in beyond.items() if out)
    return Plot(picture("rank", title, draw, (WIDE[0], 340), (NARROW[0], 320)), keys, note)


def _nested_to(search: Search) -> list[tuple[int, float]]:
    """Rank and difference to the best of the ladder of an adapter that has learnt all ranks."""
    ladder, nested = search.ladder, search.nested
    if ladder is None or nested is None:
        return []
    best = next((point.loss for point in ladder.points if point.rank == ladder.best), None)
    return [] if best is None else [(point.rank, point.loss - best) for point in nested.points]


def _rank_frame(marks: Sequence[Mark], tolerance: float, chosen: int) -> tuple[float, float]:
    """Around the decision: ranks that are far too small must not flatten the others."""
    near = max([tolerance, *(mark.high for mark in marks if mark.rank >= chosen)])
    top = min(max(near, *(mark.high for mark in marks)), max(1.3 * near, _WIDEST * tolerance)) or 0.01
    bottom = min([0.0, *(mark.delta.low for mark in marks if mark.delta is not None)])
    return bottom - 0.08 * (top - bottom), top + 0.14 * (top - bottom)


def _draw_mark(axes: Any, mark: Mark, top: float, *, strong: bool) -> None:
    x, shade = math.log2(mark.rank), colour(mark.role)
    if mark.mean > top:
        edge = 0.94 * top
        axes.plot(x, edge, "^", color=shade, markersize=9)
        label(axes, signed(mark.mean, places(mark.delta) if mark.delta else 2), (x, edge), (9, -5), "left")
        return
    if mark.delta is not None:
        axes.plot([x, x], [mark.delta.low, mark.delta.high], color=shade, linewidth=6, alpha=0.35)
        bound = mark.delta.upper
        axes.plot([x - 0.09, x + 0.09], [bound, bound], color=shade, linewidth=2)
    axes.plot(x, mark.mean, "o", color=shade, markersize=9, markeredgecolor=colour("surface"))
    if strong:
        axes.plot(x, mark.mean, "o", markersize=17, markerfacecolor="none", markeredgecolor=shade, markeredgewidth=2)
        label(
            axes, f"rank {mark.rank}", (x, mark.high), (0, 8 if mark.delta is not None else 12), "center", weight="bold"
        )


def _ranks_below(axes: Any, ranks: Sequence[int]) -> None:
    axes.set_xlim(math.log2(ranks[0]) - 0.45, math.log2(ranks[-1]) + 0.45)
    axes.xaxis.set_major_locator(FixedLocator([math.log2(rank) for rank in ranks]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{round(2**x)}"))
    axes.set_xlabel("rank")


def _rank_keys(marks: Sequence[Mark], tolerance: float, laddered: bool, cut: int | None) -> tuple[Key, ...]:
    words = {
        "tuned": "shown to be not worse, with its 95 % interval" if laddered else "within, with its 95 % interval",
        "worse": "measurably worse",
        "muted": "cannot tell" if laddered else "not within",
    }
    keys = [Key("dots", name, said) for name, said in words.items() if any(mark.role == name for mark in marks)]
    if cut is not None:
        keys.append(Key("line", "train", f"one adapter of rank {cut}, cut: against itself"))
    keys.append(Key("ring", "tuned", "smallest that is enough"))
    return (*keys, Key("dashed", "tuned", f"tolerated, {plain(float(f'{tolerance:.2g}'))}"))


# ── which rate ───────────────────────────────────────────────────────────────────────────────────────────────────────


def rates_plot(rate: Rates, base: float | None, full: int, unit: str) -> Plot:
    """Loss by learning rate, a line a rung; those that failed at the top edge."""
    losses = [loss for rung in rate.rungs for _, loss, _ in rung.learnt]
    shown = [loss for loss in losses if base is None or loss <= base] or losses
    bottom, top = min(shown), max(shown)
    room = (top - bottom) or 0.1 * abs(top) or 1.0
    bottom, top = bottom - 0.2 * room, top + 0.12 * room
    roles = [*["train"] * len(rate.rungs), "series-2", "tuned"][-len(rate.rungs) :]
    everywhere = sorted({point.lr for rung in rate.rungs for point in rung.points})

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        for lr in rate.alike:
            axes.axvspan(lr / 2**0.5, lr * 2**0.5, color=colour("tuned"), alpha=0.09, linewidth=0)
        for rung, shade in zip(rate.rungs, roles, strict=True):
            _draw_rung(axes, rung, colour(shade), top)
        _mark_best_rate(axes, rate)
        axes.set_xlim(everywhere[0] / 1.4, everywhere[-1] * 1.4)
        axes.set_ylim(bottom, top)
        axes.xaxis.set_minor_locator(NullLocator())
        wide = axes.get_figure().get_figwidth() > NARROW[0] / 72 + 1
        most = 12 if wide else 5
        axes.xaxis.set_major_locator(FixedLocator(everywhere[:: math.ceil(len(everywhere) / most)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: plain(float(f"{x:.3g}"))))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=EVEN_STEPS))
        axes.set_xlabel("learning rate")
        axes.set_title(f"loss, nats per {unit}", loc="left", color=colour("muted"), fontsize=12)

    keys = [
        Key("dots", shade, f"{share(rung.share)}, {counted(max(1, round(rung.share * full)), 'step')}")
        for rung, shade in zip(rate.rungs, roles, strict=True)
    ]
    keys.append(Key("band", "tuned", "cannot be told from the best" if len(rate.alike) > 1 else "the best"))
    if any(point.loss is None for rung in rate.rungs for point in rung.points):
        keys.append(Key("dots", "worse", "crosses at the top edge: training failed"))
    over = sorted({lr for rung in rate.rungs for lr, loss, _ in rung.learnt if loss > top})
    note = f"Worse than the base, above the frame: {', '.join(map(plain, over))}." if over else ""
    return Plot(picture("rates", f"Loss by learning rate at rank {rate.rank}", draw, WIDE, NARROW), tuple(keys), note)


def _draw_rung(axes: Any, rung: Rung, shade: str, top: float) -> None:
    found = rung.learnt
    axes.plot([lr for lr, *_ in found], [loss for _, loss, _ in found], color=shade, linewidth=1.6)
    for lr, loss, point in found:
        face = shade if point.kept else colour("surface")
        at, sign = (loss, "o") if loss <= top else (top, "^")
        axes.plot(lr, at, sign, markersize=7, markerfacecolor=face, markeredgecolor=shade, markeredgewidth=1.6)
    for point in rung.points:
        if point.loss is None:
            axes.plot(point.lr, top, "X", color=colour("worse"), markersize=9, clip_on=False, zorder=5)


def _mark_best_rate(axes: Any, rate: Rates) -> None:
    """The best of the last rung, and how far each of that rung is from it."""
    last = rate.rungs[-1].learnt
    loss = next(loss for lr, loss, _ in last if lr == rate.best)
    for lr, _, point in last:
        if point.delta is not None:
            ends = [loss + point.delta.low, loss + point.delta.high]
            axes.plot([lr, lr], ends, color=colour("tuned"), linewidth=6, alpha=0.3)
    axes.plot(rate.best, loss, "o", markersize=15, markerfacecolor="none", markeredgecolor=colour("tuned"), zorder=4)
    said = f"best {plain(float(f'{rate.best:.3g}'))}: {decimal(loss)}"
    label(axes, said, (rate.best, loss), (0, -22), "center", weight="bold")


# ── what it cost ─────────────────────────────────────────────────────────────────────────────────────────────────────


def cost_plot(cost: Cost) -> Plot:
    """What was spent beside what training every rate with every rank would have taken."""
    bars = [("this search", cost.runs, "tuned"), ("every rate with every rank at full length", cost.grid, "train")]

    def draw(axes: Any) -> None:
        axes.grid(visible=False)
        for row, (name, runs, shade) in enumerate(bars):
            axes.barh(-row, runs, height=0.36, color=colour(shade))
            said = f"{name}: {_runs(runs)}"
            label(axes, said, (0, -row), (0, 16), "left", transform=axes.get_yaxis_transform())
        axes.set_xlim(0, 1.02 * max(cost.runs, cost.grid, 1e-9))
        axes.set_ylim(-1.4, 0.75)
        axes.set_yticks([])
        axes.set_xlabel("runs of full length")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    title = "; ".join(f"{name}: {_runs(runs)}" for name, runs, _ in bars)
    return Plot(picture("cost-bars", title, draw, (WIDE[0], 160), (NARROW[0], 160)))


def _runs(runs: float) -> str:
    return f"{runs:.3g} full run{'' if runs == 1 else 's'}"
