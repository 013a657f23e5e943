"""The pictures of a search that are rows of intervals: layers, methods, ranks by layer, confirmation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from rankwise.reports.numbers import plain, signed
from rankwise.reports.plots import EVEN_STEPS, Key, Plot, difference, label
from rankwise.reports.run import Delta
from rankwise.reports.search import Bounded, Confirm, Methods, Targets
from rankwise.reports.search_allocation import Allocation
from rankwise.reports.search_plots import DASHED, places, role, short
from rankwise.reports.svg import NARROW, WIDE, colour, picture


@dataclass(frozen=True)
class Row:
    """One interval; without a difference it is what the others are compared with, or has failed."""

    said: str
    delta: Delta | None
    role: str
    failed: bool = False


def targets_plot(targets: Targets, unit: str) -> Plot:
    """Layers with as many parameters each, against the best of them."""
    rows = [
        _row(f"{short(point.targets, 20)}, rank {point.rank}", point.delta, point.verdict, point.status)
        for point in targets.points
    ]
    return _rows("targets", "Layers against the best of them", rows, f"0 = {short(targets.best, 14)}", unit)


def methods_plot(methods: Methods, unit: str) -> Plot:
    """Other methods, against what was found without them."""
    rows = [_row(short(point.name), point.delta, point.verdict, point.status) for point in methods.points]
    return _rows("methods", "Other methods against what was found", rows, "0 = as found", unit)


def confirm_plot(confirm: Confirm, unit: str) -> Plot | None:
    """The chosen rank, and its neighbours, against the best, on documents that no choice looked at."""
    rows = [
        _row(f"rank {point.rank}", point.delta, point.verdict, "finished")
        for point in confirm.points
        if point.delta is not None
    ]
    best = next((point.rank for point in confirm.points if point.delta is None), None)
    if not rows or best is None:
        return None
    return _rows("confirmed", "The chosen rank against the best", rows, f"0 = rank {best}", unit, confirm.tolerance)


def allocation_plot(allocation: Allocation, unit: str) -> Plot | None:
    """Ranks given out by layer, and the same ranks shuffled, against one rank everywhere."""
    if allocation.against is None:
        return None
    deltas = {"uniform": allocation.against.uniform, "shuffled ones": allocation.against.shuffled}
    rows = [
        Row(f"allocated against {name}: {signed(delta.mean, places(delta))}, {_told(delta)}", delta, role(_told(delta)))
        for name, delta in deltas.items()
    ]
    for point in allocation.points:
        if point.name.startswith("shuffled"):
            verdict = _told(point.delta) if point.delta is not None else "failed"
            rows.append(_row(f"{point.name} against uniform", point.delta, verdict, point.status))
    return _rows("allocated", "Ranks by layer against one rank everywhere", rows, "0", unit)


def _told(delta: Delta) -> str:
    return "better" if delta.high < 0 else "worse" if delta.low > 0 else "cannot tell"


def _row(name: str, delta: Delta | None, verdict: str, status: str) -> Row:
    if delta is None:
        failed = verdict == "failed"
        return Row(f"{name}: {status if failed else 'the best'}", None, role(verdict), failed)
    said = verdict if verdict != "best" else "the best"
    return Row(f"{name}: {signed(delta.mean, places(delta))}, {said}", delta, role(verdict))


def _rows(name: str, title: str, rows: Sequence[Row], zero: str, unit: str, tolerance: float | None = None) -> Plot:
    deltas = [row.delta for row in rows if row.delta is not None]
    ends = [0.0, tolerance or 0.0, *(end for delta in deltas for end in (delta.low, delta.high))]
    room = (max(ends) - min(ends)) or 1.0

    def draw(axes: Any) -> None:
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        for number, row in enumerate(rows):
            beside = [-number - 0.5, -number + 0.14]  # and not through the words above
            axes.plot([0, 0], beside, color=colour("ink"), linewidth=1.5)
            if tolerance is not None:
                axes.plot([tolerance] * 2, beside, color=colour("tuned"), linewidth=1.2, linestyle=DASHED)
            _draw_row(axes, -number, row)
        axes.set_xlim(min(ends) - 0.15 * room, max(ends) + 0.15 * room)
        axes.set_ylim(-len(rows) + 0.55, 0.7)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=EVEN_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: difference(value) if value else zero))
        axes.set_xlabel(f"difference, nats per {unit}")
        axes.set_title("← better", loc="left", color=colour("tuned"), fontsize=12)
        axes.set_title("worse →", loc="right", color=colour("worse"), fontsize=12)

    keys = [Key("dots", shade, said) for shade, said in _ROW_KEYS.items() if any(row.role == shade for row in rows)]
    if tolerance is not None:
        keys.append(Key("dashed", "tuned", f"tolerated, {plain(float(f'{tolerance:.2g}'))}"))
    height = 84 + 46 * len(rows)
    return Plot(picture(name, title, draw, (WIDE[0], height), (NARROW[0], height)), tuple(keys))


_ROW_KEYS = {
    "tuned": "better, best or not worse",
    "worse": "worse, or failed",
    "muted": "cannot tell",
}


def _draw_row(axes: Any, at: int, row: Row) -> None:
    shade = colour(row.role)
    if row.delta is not None:
        ends = [row.delta.low, row.delta.high]
        axes.plot(ends, [at, at], color=shade, linewidth=7, alpha=0.35, solid_capstyle="butt")
        if isinstance(row.delta, Bounded):
            axes.plot([row.delta.upper] * 2, [at - 0.16, at + 0.16], color=shade, linewidth=2)
        axes.plot(row.delta.mean, at, "o", color=shade, markersize=10, markeredgecolor=colour("surface"))
    elif not row.failed:
        axes.plot(0, at, "o", color=shade, markersize=10, markeredgecolor=colour("surface"))
    style = {"color": shade} if row.failed else {}
    label(axes, row.said, (0, at), (0, 9), "left", transform=axes.get_yaxis_transform(), **style)
