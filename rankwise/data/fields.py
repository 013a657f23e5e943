"""What a row's fields say: the shapes that rows have, and one row being read, with everything that is wrong noted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.data.problems import Problems
from rankwise.data.row import Row
from rankwise.errors import nearest


@dataclass(frozen=True)
class Shape:
    """The fields by which a row is known, and those it may have besides."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return self.needed + self.optional

    def missing(self, fields: Mapping[str, Any]) -> list[str]:
        return [key for key in self.needed if fields.get(key) is None]


Shapes = Mapping[str, Shape]


def shape_among(shapes: Shapes, fields: Mapping[str, Any]) -> str | None:
    """The first of the shapes whose needed fields are all there and not null."""
    return next((name for name, shape in shapes.items() if not shape.missing(fields)), None)


def known_shape(shapes: Shapes, row: Row, problems: Problems) -> str | None:
    """As `shape_among`; where there is none that is noted, with what comes nearest."""
    shape = shape_among(shapes, row.fields)
    if shape is None:
        named = ", or ".join(" and ".join(map(repr, one.needed)) for one in shapes.values())
        problems.add(row.origin, _no_shape(shapes, row.fields), hint=f"a row has {named}; rename the fields")
    return shape


def _no_shape(shapes: Shapes, fields: Mapping[str, Any]) -> str:
    """What is missing from the shape that comes nearest, or which known field may be meant."""
    there = ", ".join(map(repr, fields)) or "none"
    for shape in shapes.values():
        missing = shape.missing(fields)
        if missing[0] in fields:
            return f"field {missing[0]!r} is null"
        if len(missing) < len(shape.needed):
            has = next(key for key in shape.needed if key not in missing)
            guess = nearest(missing[0], [key for key in fields if key not in shape.fields])
            return f"has {has!r} but no {missing[0]!r} (fields: {there}){guess}"
    known = [key for shape in shapes.values() for key in shape.needed]
    guess = next((text for key in fields if (text := nearest(key, known))), "")
    return f"no known shape of row (fields: {there}){guess}"


class Fields:
    """One row being read.  Problems are noted and reading goes on to the next field; `failed` says that there were."""

    def __init__(self, row: Row, problems: Problems) -> None:
        self._row, self._fields, self._problems = row, row.fields, problems
        self.failed = False

    def text(self, field: str) -> str:
        """A field that must say something; empty where that was noted."""
        text = self.string(field, self._fields[field])
        if text is not None and not text.strip():
            self.wrong(field, "is empty, expected text to learn")
        return text or ""

    def string(self, where: str, value: Any) -> str | None:
        """The value when it is text a tokenizer takes; None when it is not, which is noted."""
        if not isinstance(value, str):
            self.wrong(where, f"is {shown(value)}, expected a string")
            return None
        stray = _NOT_TEXT.search(value)
        if stray is None:
            return value
        name = "a NUL" if stray[0] == "\0" else "half of a surrogate pair"
        self.wrong(where, f"holds {name} (\\u{ord(stray[0]):04x}) at character {stray.start() + 1}, expected text")
        return None

    def wrong(self, where: str, what: str) -> None:
        self.failed = True
        self._problems.add(self._row.origin, f"{where} {what}")


_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


def shown(value: Any) -> str:
    """A value as a person would name it: its kind, and the beginning of itself."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "the string", list: "a list"}
    kind = next((name for type_, name in names.items() if isinstance(value, type_)), "an object")
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{kind} ({text if len(text) <= 40 else text[:37] + '…'})"
