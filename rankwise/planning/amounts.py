"""Amounts of memory, read and written: `24GiB` is 24 × 2³⁰ bytes, `24GB` is 24 × 10⁹."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{mark}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for mark, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.I)


def read_amount(text: str) -> int:
    """Bytes.

    Raises:
        ValueError: it is no amount, or none above 0.

    >>> read_amount("24GiB"), read_amount("1.5 GB")
    (25769803776, 1500000000)
    """
    found = _AMOUNT.fullmatch(text)
    size = _UNITS.get(found[2].lower()) if found else None
    if found is None or size is None or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; expected one such as 24GiB, 24GB or 800MiB")
    return round(float(found[1]) * size)


def shown(size: float) -> str:
    """For people, in powers of ten, three digits.

    >>> shown(13_476_839_424), shown(81_920), shown(-2.5e9)
    ('13.5 GB', '81.9 kB', '-2.50 GB')
    """
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(size) >= 0.9995 * unit:
            value = size / unit
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:,.{digits}f} {name}"
    return f"{size:,.0f} B"
