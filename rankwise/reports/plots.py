"""The pictures of a run.  Each is one question; what the picture cannot say, its keys and its note do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from rankwise.reports.numbers import MINUS, counted, decimal, decimals_for, percent, plain, signed
from rankwise.reports.paired import Paired
from rankwise.reports.run import AdapterLoss, Compression, Curve, Evaluation, Run, Validation
from rankwise.reports.series import MOST_POINTS, Series, finite, thin, training_losses, window
from rankwise.reports.svg import NARROW, SMALL, WIDE, colour, picture
from rankwise.reports.verdict import judge_adapter
from rankwise.reports.words import USUAL, Words

VERDICT_ROLE = {"better": "tuned", "worse": "worse", "unclear": "muted"}
ADAPTER_ROLES = ("tuned", "series-2", "series-3", "series-4")

# A gradient that varies by more than this is read on a logarithmic axis.
WIDE_RANGE = 30
LONGEST_NAME = 24
FEWEST_FOR_QUANTILES = 20

EVEN_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Key:
    """One line of a legend; `style` and `role` name the swatch in the stylesheet."""

    style: Literal["faint", "line", "dots", "dotted", "dashed", "area", "band", "ring"]
    role: str
    label: str


@dataclass(frozen=True)
class Plot:
    picture: Markup
    keys: tuple[Key, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Track:
    """One adapter's losses, ready to draw."""

    name: str
    raw: Series
    smooth: Series
    validation: Series
    train_role: str
    validation_role: str


# ── loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def loss_plot(run: Run) -> Plot | None:
    """Training and validation loss by step, the base's loss where it is known."""
    tracks = [_track(name, curve, index, len(run.curves)) for index, (name, curve) in enumerate(run.curves.items())]
    tracks = [track for track in tracks if track.raw.xs or track.validation.xs]
    if not tracks:
        return None
    base = run.evaluation.base.loss if run.evaluation else None
    best, words = _best(run), Words.of(run)
    bottom, top = _frame(tracks, base)

    def draw(axes: Any) -> None:
        for track in tracks:
            _draw_track(axes, track, raw=len(tracks) == 1)
        if base is not None:
            axes.axhline(base, color=colour("ink"), linewidth=1.2, linestyle=(0, (5, 4)))
            label(
                axes,
                f"{words.reference} {decimal(base)}",
                (1, base),
                (0, 4),
                "right",
                transform=axes.get_yaxis_transform(),
            )
        if best is not None:
            _mark_best(axes, best, last=max(max(track.raw.xs + track.validation.xs) for track in tracks))
        axes.set_ylim(bottom, top)
        _steps_below(axes, f"nats per {words.unit}")

    beyond = sum(y > top for track in tracks for y in track.raw.ys) if len(tracks) == 1 else 0
    return Plot(
        picture("loss", f"Loss by step, in nats per {words.unit}", draw, WIDE, NARROW),
        _loss_keys(tracks, words.reference if base is not None else None, best),
        f"{counted(beyond, 'step')} lost more than the frame shows." if beyond else "",
    )


def _track(name: str, curve: Curve, index: int, adapters: int) -> Track:
    raw, smoothed = training_losses(curve)
    looks = finite([look.step for look in curve.validations], [look.loss for look in curve.validations])
    role = ADAPTER_ROLES[index % len(ADAPTER_ROLES)]
    return Track(name, raw, smoothed, looks, "train" if adapters == 1 else role, role)


def _frame(tracks: Sequence[Track], base: float | None) -> tuple[float, float]:
    """A frame around what matters: the wildest hundredth of the steps must not flatten the rest."""
    values = [y for track in tracks for y in track.validation.ys]
    values += [] if base is None else [base]
    for track in tracks:
        ordered = sorted(track.raw.ys if len(tracks) == 1 else track.smooth.ys)
        values += ordered[len(ordered) // 100 : len(ordered) - len(ordered) // 100]
    low, high = min(values), max(values)
    room = (high - low) or abs(high) * 0.1 or 1.0
    return low - 0.12 * room, high + 0.08 * room


def _draw_track(axes: Any, track: Track, *, raw: bool) -> None:
    if raw:
        drawn = thin(track.raw)
        axes.plot(drawn.xs, drawn.ys, color=colour(track.train_role), linewidth=0.9, alpha=0.35)
    drawn = thin(track.smooth)
    alone = {"marker": "o", "markersize": 4} if len(drawn.xs) == 1 else {}
    axes.plot(drawn.xs, drawn.ys, color=colour(track.train_role), linewidth=2, **alone)
    axes.plot(
        track.validation.xs,
        track.validation.ys,
        color=colour(track.validation_role),
        linewidth=2,
        linestyle="-" if raw else ":",
        marker="o",
        markersize=6,
        markeredgecolor=colour("surface"),
        markeredgewidth=1.2,
    )


def _best(run: Run) -> Validation | None:
    if run.record.training is None or len(run.curves) != 1:
        return None
    (curve,) = run.curves.values()
    looks = [look for look in curve.validations if look.step == run.record.training.best_step]
    return looks[0] if looks and looks[0].loss is not None and math.isfinite(looks[0].loss) else None


def _mark_best(axes: Any, best: Validation, *, last: float) -> None:
    axes.plot(
        best.step, best.loss, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour("tuned"), zorder=4
    )
    side = "right" if best.step > last / 2 else "left"
    label(axes, f"best {decimal(best.loss or 0)}", (best.step, best.loss), (6 if side == "right" else -6, -20), side)


def _loss_keys(tracks: Sequence[Track], reference: str | None, best: Validation | None) -> tuple[Key, ...]:
    if len(tracks) > 1:
        keys = [Key("line", track.validation_role, track.name) for track in tracks]
        if any(track.validation.xs for track in tracks):
            keys.append(Key("dotted", "muted", "validation, dotted"))
    else:
        (track,) = tracks
        keys = []
        if track.raw.xs:
            keys.append(Key("faint", "train", "training, each step"))
        if (neighbours := window(len(track.raw.xs))) > 1:
            keys.append(Key("line", "train", f"training, mean of {neighbours} steps"))
        if track.validation.xs:
            keys.append(Key("dots", "tuned", "validation"))
    if best is not None:
        keys.append(Key("ring", "tuned", f"best: step {best.step}"))
    if reference is not None:
        keys.append(Key("dashed", "ink", f"{reference}, on the evaluation documents"))
    return tuple(keys)


# ── base against tuned ───────────────────────────────────────────────────────────────────────────────────────────────


def interval_plot(evaluation: Evaluation, words: Words = USUAL) -> Plot:
    """The difference to the base with its interval, an adapter a row, the base as the line at zero."""
    adapters = evaluation.adapters
    ends = [0.0, *(end for adapter in adapters for end in (adapter.delta.low, adapter.delta.high))]
    room = (max(ends) - min(ends)) or 1.0

    def draw(axes: Any) -> None:
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color=colour("ink"), linewidth=1.5)
        for row, adapter in enumerate(adapters):
            _draw_interval(axes, -row, adapter, evaluation)
        axes.set_xlim(min(ends) - 0.22 * room, max(ends) + 0.22 * room)
        axes.set_ylim(-len(adapters) + 0.5, 0.75)
        axes.set_yticks([])
        axes.set_xlabel(f"difference to {words.against}, nats per {words.unit}")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=EVEN_STEPS))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: difference(value) if value else f"0 = {words.reference}")
        )
        axes.set_title("← better", loc="left", color=colour("tuned"), fontsize=12)
        axes.set_title("worse →", loc="right", color=colour("worse"), fontsize=12)

    height = 84 + 48 * len(adapters)
    title = f"Difference to {words.against} with its {100 * evaluation.confidence:g} % interval"
    return Plot(picture("interval", title, draw, (WIDE[0], height), (NARROW[0], height)))


def _draw_interval(axes: Any, row: int, adapter: AdapterLoss, evaluation: Evaluation) -> None:
    delta = adapter.delta
    shade = colour(VERDICT_ROLE[judge_adapter(evaluation, adapter)])
    axes.plot([delta.low, delta.high], [row, row], color=shade, linewidth=7, alpha=0.35, solid_capstyle="butt")
    axes.plot(delta.mean, row, "o", color=shade, markersize=11, markeredgecolor=colour("surface"), markeredgewidth=1.5)
    text = signed(delta.mean, decimals_for((delta.high - delta.low) / 2))
    if len(evaluation.adapters) > 1:
        short = adapter.name if len(adapter.name) <= LONGEST_NAME else f"{adapter.name[: LONGEST_NAME - 1]}…"
        text = f"{short}: {text}"
    label(axes, text, (delta.mean, row), (0, 10), "center", weight="bold")


def documents_plot(paired: Paired, words: Words = USUAL) -> Plot:
    """Every document's difference, the greatest gain first: how many, and how much, at one look."""
    bars = min(paired.documents, MOST_POINTS)
    edges = [bar * paired.documents / bars for bar in range(bars + 1)]
    heights = [paired.differences[int(edge)] for edge in edges[:-1]]
    bottom, top = _room(paired)

    def draw(axes: Any) -> None:
        for role, sign in (("tuned", -1), ("worse", 1)):
            shown = [height if height * sign > 0 else 0.0 for height in heights]
            axes.stairs(shown, edges, fill=True, color=colour(role), alpha=0.85, linewidth=0)
        axes.axhline(0, color=colour("ink"), linewidth=1.5)
        axes.set_xlim(0, paired.documents)
        axes.set_ylim(bottom, top)
        axes.set_xlabel("documents, sorted by what training changed")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=EVEN_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: difference(value)))
        axes.set_title(
            f"nats per {words.unit}, tuned − {words.reference}", loc="left", color=colour("muted"), fontsize=12
        )

    keys = [
        Key("area", "tuned", f"{paired.better:,} better ({percent(paired.better, paired.documents)})"),
        Key("area", "worse", f"{paired.worse:,} worse ({percent(paired.worse, paired.documents)})"),
    ]
    if paired.same:
        keys.append(Key("area", "line", f"{paired.same:,} unchanged"))
    note = (
        ""
        if paired.documents < FEWEST_FOR_QUANTILES
        else (
            f"The median document changes by {signed(paired.quantile(0.5))} {words.nats}; nine in ten lie between "
            f"{signed(paired.quantile(0.05))} and {signed(paired.quantile(0.95))}; the extremes are "
            f"{signed(paired.differences[0])} and {signed(paired.differences[-1])}."
        )
    )
    title = f"Difference to {words.against} of each of {counted(paired.documents, 'document')}: {keys[0].label}"
    return Plot(picture("documents", title, draw, WIDE, NARROW), tuple(keys), note)


def _room(paired: Paired) -> tuple[float, float]:
    """Down to the extremes, unless a few of them would flatten all the others: the note has their numbers."""
    low, high = paired.differences[0], paired.differences[-1]
    usual = max(abs(paired.quantile(0.02)), abs(paired.quantile(0.98)))
    low, high = max(low, -2 * usual), min(high, 2 * usual)
    low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) or 1.0
    return low - 0.05 * room, high + 0.05 * room


# ── what was left out ────────────────────────────────────────────────────────────────────────────────────────────────


def compression_plot(found: Compression, words: Words = USUAL) -> Plot:
    """The loss by size, against the whole adapter: where the first half led, and what the second half decided."""
    whole = found.parameters["whole"]
    looked = [(100 * size.parameters / whole, size.delta.mean) for size in found.first]
    ends = [0.0, found.tolerance, *(end for size in found.second for end in (size.delta.low, size.delta.high))]
    room = (max(ends) - min(ends)) or 1.0
    bottom, top = min(ends) - 0.15 * room, max(ends) + 0.25 * room

    def draw(axes: Any) -> None:
        axes.axhline(0, color=colour("ink"), linewidth=1.2)
        axes.axhline(found.tolerance, color=colour("worse"), linewidth=1.2, linestyle=(0, (5, 4)))
        axes.plot([x for x, _ in looked], [y for _, y in looked], "o", color=colour("train"), markersize=5, alpha=0.5)
        for size in found.second:
            at, shade = 100 * size.parameters / whole, colour("tuned" if size.within else "worse")
            axes.plot([at, at], [size.delta.low, size.delta.high], color=shade, linewidth=5, alpha=0.35)
            axes.plot(at, size.delta.mean, "o", color=shade, markersize=9, markeredgecolor=colour("surface"))
        label(axes, f"{100 * found.kept:.0f} %", (100 * found.kept, found.delta.high), (0, 6), "center", weight="bold")
        axes.set_xlim(0, 103)
        axes.set_ylim(bottom, top)
        axes.set_xlabel("parameters kept, %")
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=EVEN_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: difference(value)))
        axes.set_title(
            f"nats per {words.unit}, against the whole adapter", loc="left", color=colour("muted"), fontsize=12
        )

    beyond = sum(not bottom <= y <= top for _, y in looked)
    keys = [
        Key("dots", "train", "first half, which chose"),
        Key("dots", "tuned", "second half, within the tolerance, with its 90 % interval"),
    ]
    if not all(size.within for size in found.second):
        keys.append(Key("dots", "worse", "second half, not within"))
    keys.append(Key("dashed", "worse", f"the tolerance, {decimal(found.tolerance, found.decimals)}"))
    note = f"{counted(beyond, 'smaller size')} cost more than the frame shows." if beyond else ""
    return Plot(picture("compression", "Loss by parameters kept", draw, WIDE, NARROW), tuple(keys), note)


# ── how the training went ────────────────────────────────────────────────────────────────────────────────────────────


def rate_plot(run: Run) -> Plot | None:
    """The learning rate by step."""
    series = [finite([s.step for s in c.steps], [s.lr for s in c.steps]) for c in run.curves.values()]
    return _small("rate", "Learning rate by step", "learning rate", series)


def norm_plot(run: Run) -> Plot | None:
    """The norm of the gradient by step, before clipping."""
    series = [finite([s.step for s in c.steps], [s.grad_norm for s in c.steps]) for c in run.curves.values()]
    return _small("norm", "Gradient norm by step", "gradient norm", series)


def _small(name: str, title: str, unit: str, many: Sequence[Series]) -> Plot | None:
    drawn = [thin(series) for series in many if series.xs]
    if not drawn:
        return None
    return Plot(picture(name, title, partial(_draw_small, many=drawn, unit=unit), SMALL))


def _draw_small(axes: Any, many: Sequence[Series], unit: str) -> None:
    for index, series in enumerate(many):
        role = "train" if len(many) == 1 else ADAPTER_ROLES[index % len(ADAPTER_ROLES)]
        alone = {"marker": "o", "markersize": 4} if len(series.xs) == 1 else {}
        axes.plot(series.xs, series.ys, color=colour(role), linewidth=1.5, **alone)
    values = [y for series in many for y in series.ys]
    low, high = min(values), max(values)
    if low > 0 and high / low > WIDE_RANGE and unit == "gradient norm":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    else:
        axes.set_ylim(min(0.0, low), high * 1.1 if high > 0 else 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    _steps_below(axes, unit)


def _steps_below(axes: Any, unit: str) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_title(unit, loc="left", color=colour("muted"), fontsize=12)


def difference(value: float) -> str:
    """A difference on an axis, with its sign."""
    return f"{value:+g}".replace("-", MINUS) if value else "0"


def label(axes: Any, text: str, at: Any, offset: tuple[int, int], side: str, **style: Any) -> None:
    """Words at a point of the data, moved by some pixels."""
    transform = style.pop("transform", axes.transData)
    axes.annotate(
        text, at, offset, xycoords=transform, textcoords="offset points", ha=side, annotation_clip=False, **style
    )
