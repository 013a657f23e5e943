"""Numbers as people read them: true minus signs, as many digits as are meant, a unit beside each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

MINUS = "\N{MINUS SIGN}"
FEWEST_DECIMALS, MOST_DECIMALS = 3, 6


def decimals_for(uncertainty: float) -> int:
    """Enough decimals to show two digits of an interval's half-width, within reason."""
    if not uncertainty > 0:
        return FEWEST_DECIMALS
    return min(max(1 - math.floor(math.log10(uncertainty)), FEWEST_DECIMALS), MOST_DECIMALS)


def decimal(value: float, places: int = FEWEST_DECIMALS) -> str:
    """`−0.412`; never a minus before zero."""
    text = f"{value:.{places}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float, places: int = FEWEST_DECIMALS) -> str:
    """As `decimal`, with a plus where a difference is positive."""
    text = decimal(value, places)
    return text if text.startswith(MINUS) or float(text) == 0 else f"+{text}"


def perplexity(loss: float) -> str:
    """exp(loss), with the digits that a reader can use."""
    if loss > math.log(1e6):
        return "over a million"
    value = math.exp(loss)
    return f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 3 else 2}f}"


def count(value: int) -> str:
    return f"{value:,}"


def short_count(value: int) -> str:
    """Three digits are enough for a headline: `4.88 M`."""
    for unit, worth in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= worth:
            return f"{value / worth:.3g} {unit}"
    return f"{value}"


def counted(value: int, noun: str) -> str:
    """`1 document`, `214 documents`."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def percent(part: int, whole: int) -> str:
    """Whole per cent; `100 %` and `0 %` only where they are exact."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    share = 100 * part / whole
    if share > 99:
        return "over 99 %"
    return "under 1 %" if share < 1 else f"{share:.0f} %"


def size(bytes_: int) -> str:
    """Decimal units, as memory and disks are sold."""
    for unit, worth in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if bytes_ >= worth:
            value = bytes_ / worth
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{bytes_} B"


def duration(seconds: float) -> str:
    """`41 s`, `2 min 41 s`, `3 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def plain(value: float) -> str:
    """A setting's number as one would type it: `16`, `0.05`, `2e-4`."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def anything(value: Any) -> str:
    """Any JSON value in a table's cell."""
    if isinstance(value, list | tuple):
        text = ", ".join(anything(item) for item in value)
    elif isinstance(value, dict):
        text = ", ".join(f"{key}: {anything(item)}" for key, item in value.items())
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = plain(value)
    else:
        text = "" if value is None else str(value)
    return text or "none"


def unbroken(text: str) -> str:
    """Keeps a number with its unit and an interval with its ends on one line."""
    for sign in ("%", "…", "→"):
        text = text.replace(f" {sign}", f"\N{NO-BREAK SPACE}{sign}")
    return re.sub(r"([…→]) ", "\\1\N{NO-BREAK SPACE}", text)


def ranges(numbers: Iterable[int]) -> str:
    """`0–11, 14, 20–29` of any integers."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in runs)
