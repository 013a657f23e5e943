"""Rows out of JSON: one object a line, or one document that holds a list of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankwise.data.lines import read_lines
from rankwise.data.problems import Problems
from rankwise.data.row import Origin, Row

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
# A row may itself hold one list of objects; such a document is that row, not a wrapper around rows.
_LISTS_OF_ONE_ROW = ("messages", "conversations")


def read_jsonl(path: Path, problems: Problems) -> Iterator[Row]:
    """One row a line; blank lines are skipped.  A file that turns out to be one JSON array is read as that."""
    begun = False
    for line in read_lines(path, problems):
        text = line.text.strip()
        if not line.sound or not text:
            continue
        if not begun and text.startswith("["):
            yield from read_json(path, problems)
            return
        begun = True
        origin = Origin(str(path), line.number)
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            problems.add(origin, _not_json(error), hint="one whole object a line; other layouts are read from .json")
            continue
        if isinstance(fields, dict):
            yield Row(origin, fields, line.read)
        else:
            problems.add(origin, f"{_kind(fields)}, expected an object {{…}}")


def read_json(path: Path, problems: Problems) -> Iterator[Row]:
    """A list of objects; an object with one such list inside, as in {"data": […]}; or objects one after the other."""
    before = len(problems)
    text = "".join(line.text for line in read_lines(path, problems))
    if len(problems) > before or not text.strip():
        return
    document = _Document(path, text)
    try:
        for origin, value, read in document.rows():
            if isinstance(value, dict):
                yield Row(origin, value, read)
            else:
                problems.add(origin, f"{_kind(value)}, expected an object {{…}}")
    except json.JSONDecodeError as error:
        problems.add(f"{path}:{error.lineno}", _not_json(error))
    except (ValueError, RecursionError) as error:
        problems.add(document.origin(), _not_json(error))


class _Document:
    """A text and a place in it.  Values are decoded one by one, so the rows are never all in memory as objects."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text
        self._counted = (0, 1)  # up to this place, this line
        # A line that every row shares tells nobody which row is meant, and would make all of them one.
        self._numbered = "\n" not in text.strip()
        self._at = self._row = 0
        self._skip()

    def rows(self) -> Iterator[tuple[Origin, Any, float]]:
        if self._text.startswith("[", self._at):
            yield from self._elements()
        elif (inside := self._list_inside()) is not None:
            self._at = inside
            yield from self._elements(whole=False)
        else:  # objects one after the other, however they are laid out: JSON lines under another name
            while self._at < len(self._text):
                yield self._next_row()

    def origin(self) -> Origin:
        if self._numbered:
            return Origin(str(self._path), max(1, self._row), numbered=True)
        place, line = self._counted
        if self._at > place:
            self._counted = (self._at, line + self._text.count("\n", place, self._at))
        return Origin(str(self._path), self._counted[1])

    def _elements(self, whole: bool = True) -> Iterator[tuple[Origin, Any, float]]:
        self._take("[")
        if not self._text.startswith("]", self._at):
            yield self._next_row()
            while self._text.startswith(",", self._at):
                self._take(",")
                yield self._next_row()
        self._take("]")
        if whole and self._at < len(self._text):
            raise json.JSONDecodeError("Extra data after the list", self._text, self._at)

    def _list_inside(self) -> int | None:
        """Where the only list of objects begins, when the document is one object around it."""
        start, found = self._at, []
        self._take("{")
        while self._text.startswith('"', self._at):
            _, key, _ = self._value()
            self._take(":")
            begins = self._at
            _, value, _ = self._value()
            if isinstance(value, list) and value and isinstance(value[0], dict) and key not in _LISTS_OF_ONE_ROW:
                found.append(begins)
            if self._text.startswith(",", self._at):
                self._take(",")
        self._take("}")
        alone = self._at == len(self._text)
        self._at, self._counted = start, (0, 1)
        return found[0] if alone and len(found) == 1 else None

    def _next_row(self) -> tuple[Origin, Any, float]:
        self._row += 1
        return self._value()

    def _value(self) -> tuple[Origin, Any, float]:
        origin = self.origin()
        value, self._at = _DECODER.raw_decode(self._text, self._at)
        self._skip()
        return origin, value, self._at / len(self._text)

    def _take(self, mark: str) -> None:
        if not self._text.startswith(mark, self._at):
            raise json.JSONDecodeError(f"Expecting {mark!r}", self._text, self._at)
        self._at += len(mark)
        self._skip()

    def _skip(self) -> None:
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
