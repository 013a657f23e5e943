"""Blocks of a model by their numbers: how a person writes them, and in which one a layer stands.  Torch-free.

A block is a numbered child along a path, with the name of what holds it before and a layer behind:
`model.layers.3.mlp.up_proj` stands in block 3, `encoder.block.0.layer.1.wi` in block 0, an expert in the block around
it.  A number that ends a path (`head.2`) is a layer, and one that begins it has no stack around it: neither is a block.
So PEFT's `layers_to_transform` counts too.  Where a model has several stacks, a number means that block of each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

_MOST = 4096  # no model has as many; keeps a slip of the finger from being counted out
_RUN = re.compile(r"(\d{1,9})\s*(?:([-–])\s*(\d{1,9})?)?")
_HOW = "expected numbers and ranges, such as 0-11,20 or 16-"


def block_of(path: str) -> int | None:
    """The number of the block a layer stands in, or None for one outside all blocks (head, embedding)."""
    return next((int(part) for part in path.split(".")[1:-1] if part.isdecimal()), None)


def read_blocks(value: Any) -> str:
    """Blocks in one spelling, ascending, without doubles; "" is every layer, in blocks or not.

    Args:
        value: a number, several, or text as on the command line; `16-` reaches to the last block.

    Raises:
        ValueError: it is none of these.

    >>> read_blocks("20, 0-3,2-11"), read_blocks((4, 1, 2)), read_blocks("3,16-")
    ('0-11,20', '1-2,4', '3,16-')
    """
    if isinstance(value, str):
        runs = [_run(part.strip()) for part in value.split(",") if part.strip()]
        if value.strip() and not runs:
            raise ValueError(_HOW)
        return _written(runs)
    numbers = list(value) if isinstance(value, Iterable) else [value]
    if not all(type(number) is int for number in numbers):
        raise ValueError(_HOW)
    return _written([_checked(number, number) for number in numbers])


def holds(blocks: str, path: str) -> bool:
    """Whether a layer stands in one of `blocks`, as `read_blocks` writes them."""
    if not blocks:
        return True
    number = block_of(path)
    return number is not None and any(first <= number <= last for first, last in map(_run, blocks.split(",")))


def lacking(blocks: str, there: Collection[int]) -> str:
    """Those of `blocks` that are not among the numbers `there`, written alike; a run without end needs one of them."""
    runs = [_run(part) for part in blocks.split(",") if part]
    endless = [(first, last) for first, last in runs if last == _MOST and not any(n >= first for n in there)]
    numbers = {n for first, last in runs if last < _MOST for n in range(first, last + 1)} - set(there)
    return _written([*((n, n) for n in numbers), *endless])


def _run(text: str) -> tuple[int, int]:
    """The first and the last number; `_MOST` for one without end."""
    found = _RUN.fullmatch(text)
    if found is None:
        below = "; blocks are counted from 0" if text.startswith("-") else ""
        raise ValueError(f"{text!r} names no blocks: {_HOW}{below}")
    first, dash, last = found.groups()
    if dash and not last:
        return _checked(int(first), _MOST - 1)[0], _MOST
    return _checked(int(first), int(last) if last else int(first))


def _checked(first: int, last: int) -> tuple[int, int]:
    if not 0 <= first <= last < _MOST:
        raise ValueError(f"{first if first == last else f'{first}-{last}'}: blocks are counted from 0 upwards, {_HOW}")
    return first, last


def _written(runs: Iterable[tuple[int, int]]) -> str:
    joined: list[tuple[int, int]] = []
    for first, last in sorted(runs):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return ",".join(_spelt(first, last) for first, last in joined)


def _spelt(first: int, last: int) -> str:
    if last == _MOST:
        return f"{first}-"
    return f"{first}" if first == last else f"{first}-{last}"
