"""What a search left in detail: how each candidate learnt, and the rank of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from rankwise.adapters.blocks import block_of
from rankwise.reports.numbers import counted
from rankwise.reports.plots import Key, Plot
from rankwise.reports.search import Search, Trial
from rankwise.reports.search_plots import short
from rankwise.reports.series import Series, finite, smooth, thin
from rankwise.reports.svg import NARROW, WIDE, colour, picture

MOST_POINTS = 120  # of one of many curves
_CELL = 22  # pixels that a number needs
_DARKEST = 0.62  # a number in the page's ink can be read on it, light and dark

# ── learning curves ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Trace:
    trial: Trial
    drawn: Series
    kept: bool

    @property
    def failed(self) -> bool:
        return self.trial.loss is None


def curves_plot(search: Search, step: str, unit: str) -> Plot | None:
    """Training losses of all candidates of a step, smoothed; where each stopped."""
    kept, needed = _losses(search, step)
    trials = [t for t in search.trials if t.step == step or _among(t.loss, needed)]
    traces = [Trace(trial, _drawn(trial), _among(trial.loss, kept)) for trial in trials]
    traces = sorted((trace for trace in traces if trace.drawn.xs), key=lambda trace: (trace.kept, trace.failed))
    if not traces:
        return None
    bottom, top = _frame(traces)

    def draw(axes: Any) -> None:
        for trace in traces:
            _draw_trace(axes, trace, top)
        axes.set_ylim(bottom, top)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(f"training loss, nats per {unit}, smoothed", loc="left", color=colour("muted"), fontsize=12)

    strong = [trace for trace in traces if trace.kept]
    keys = [Key("dots", "tuned", "kept")] if strong else []
    if any(not trace.kept and not trace.failed for trace in traces):
        keys.append(Key("dots", "train", "not kept" if strong else "each trial"))
    if failed := sum(trace.failed for trace in traces):
        keys.append(Key("dots", "worse", f"failed: {failed}"))
    title = f"Training losses of {counted(len(traces), 'trial')}"
    return Plot(picture(f"curves-{step}", title, draw, (WIDE[0], 250), (NARROW[0], 230)), tuple(keys))


def _losses(search: Search, step: str) -> tuple[list[float], list[float]]:
    """Of those that a step kept, and of all it compared: trials that an earlier step had made are found by these."""
    pairs: list[tuple[float | None, bool]] = []
    if step == "rate" and search.rate is not None:
        pairs = [(point.loss, point.kept) for rung in search.rate.rungs for point in rung.points]
    elif step == "targets" and (targets := search.targets) is not None:
        pairs = [(point.loss, point.targets == targets.chosen) for point in targets.points]
    elif step == "ladder" and (ladder := search.ladder) is not None:
        pairs = [(point.loss, point.rank == ladder.chosen) for point in ladder.points]
    elif step == "methods" and search.methods is not None:
        pairs = [(point.loss, point.verdict == "better") for point in search.methods.points]
    return [x for x, kept in pairs if kept and x is not None], [x for x, _ in pairs if x is not None]


def _among(loss: float | None, losses: Sequence[float]) -> bool:
    return loss is not None and any(math.isclose(loss, one, rel_tol=1e-12) for one in losses)


def _drawn(trial: Trial) -> Series:
    raw = finite([step for step, _ in trial.curve], [loss for _, loss in trial.curve])
    return thin(smooth(raw, [1.0] * len(raw.xs)), MOST_POINTS)


def _frame(traces: Sequence[Trace]) -> tuple[float, float]:
    """Around those that learnt: one that diverged leaves through the top."""
    values = sorted(y for trace in traces if not trace.failed for y in trace.drawn.ys)
    values = values or sorted(y for trace in traces for y in trace.drawn.ys)
    low, high = values[0], values[-1 - len(values) // 100]
    room = (high - low) or 0.1 * abs(high) or 1.0
    return low - 0.08 * room, high + 0.08 * room


def _draw_trace(axes: Any, trace: Trace, top: float) -> None:
    shade = colour("worse" if trace.failed else "tuned" if trace.kept else "train")
    xs, ys = trace.drawn.xs, trace.drawn.ys
    axes.plot(xs, ys, color=shade, linewidth=2 if trace.kept else 1)
    style = {"marker": "o", "markersize": 7 if trace.kept else 4, "color": shade}
    if trace.failed:
        style |= {"marker": "X", "markersize": 9, "clip_on": False, "zorder": 5}
    # One that left through the top for good is marked where it did.
    last = max((number for number, y in enumerate(ys) if y <= top), default=-1)
    at = (xs[-1], ys[-1]) if last == len(ys) - 1 else (xs[last + 1], top)
    axes.plot(*at, **style)


# ── the rank of each layer ───────────────────────────────────────────────────────────────────────────────────────────


def kinds(ranks: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Rank by block, of each kind of layer; a kind is named by as much of its path's end as tells it from others."""
    tails: dict[str, dict[int, int]] = {}
    for path, rank in ranks.items():
        block = block_of(path)
        if block is not None:
            tails.setdefault(_without(path, block), {})[block] = rank
    return {_shortest(path, tails): found for path, found in tails.items()}


def outside(ranks: Mapping[str, int]) -> dict[str, int]:
    """Layers in no block."""
    return {path: rank for path, rank in ranks.items() if block_of(path) is None}


def _without(path: str, block: int) -> str:
    """A path whose block is any."""
    parts = path.split(".")
    at = next(n for n, part in enumerate(parts) if n and part.isdecimal() and int(part) == block)
    return ".".join([*parts[:at], "*", *parts[at + 1 :]])


def _shortest(path: str, others: Mapping[str, Any]) -> str:
    parts = path.split(".")
    for length in range(1, len(parts)):
        tail = parts[-length:]
        if sum(other.split(".")[-length:] == tail for other in others) == 1:
            return ".".join(tail)
    return path


def ranks_plot(ranks: Mapping[str, int], *, given: bool = False) -> Plot | None:
    """How much of each layer is left, or is given out to it: a row a kind of layer, a column a block."""
    rows = kinds(ranks)
    if not rows:
        return None
    blocks = sorted({block for found in rows.values() for block in found})
    most = max(1, *(rank for found in rows.values() for rank in found.values()))

    def draw(axes: Any) -> None:
        width = axes.get_figure().get_figwidth() * 72
        written = (width - 90) / len(blocks) >= _CELL
        for row, found in enumerate(rows.values()):
            for column, block in enumerate(blocks):
                if block in found:
                    _draw_cell(axes, (column, row), found[block], most, written=written)
        axes.grid(visible=False)
        axes.set_xlim(0, len(blocks))
        axes.set_ylim(len(rows), -0.05)
        axes.set_yticks([row + 0.5 for row in range(len(rows))], [short(name, 16) for name in rows])
        every = math.ceil(len(blocks) / (15 if width > NARROW[0] else 6))
        shown = range(0, len(blocks), every)
        axes.set_xticks([column + 0.5 for column in shown], [str(blocks[column]) for column in shown])
        axes.tick_params(axis="x", length=0)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("block")

    height = 56 + 26 * len(rows)
    keys = [Key("area", "tuned", f"strongest: rank {most}")]
    if not given:
        keys.append(Key("area", "line", "nothing left"))
    alone = outside(ranks)
    note = f"In no block: {', '.join(f'{path} {rank}' for path, rank in alone.items())}." if alone else ""
    least = min(rank for found in rows.values() for rank in found.values()) if given else 0
    name, what = ("given", "given out to each layer") if given else ("kept", "kept of each layer")
    title = f"Rank {what}, from {least} to {most}"
    return Plot(picture(name, title, draw, (WIDE[0], height), (NARROW[0], height)), tuple(keys), note)


def _draw_cell(axes: Any, at: tuple[int, int], rank: int, most: int, *, written: bool) -> None:
    shade, alpha = ("line", 0.45) if rank == 0 else ("tuned", 0.06 + (_DARKEST - 0.06) * rank / most)
    cell = Rectangle((at[0] + 0.04, at[1] + 0.04), 0.92, 0.92, facecolor=colour(shade), alpha=alpha, linewidth=0)
    axes.add_patch(cell)
    if written:
        axes.text(at[0] + 0.5, at[1] + 0.53, str(rank), ha="center", va="center", fontsize=10)
