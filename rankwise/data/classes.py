"""The classes of a data set: found in the rows that are learnt from, and what a row says of its class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.fields import shown
from rankwise.data.problems import Problems
from rankwise.data.rows import read_rows
from rankwise.errors import DataError, listing

Label = int | str
LABEL, NAME = "label", "label_name"
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Classes:
    """In the order of their numbers.

    Attributes:
        names: what people call them.
        labels: how rows say them: a number, or the name itself.
        counts: how many rows are learnt from of each; () where nobody counted.
    """

    names: tuple[str, ...]
    labels: tuple[Label, ...]
    counts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def number(self, label: Label, name: str | None = None) -> int | None:
        """The number of the class that a row means, or None: there is no such class.

        A name goes before a number, in whatever case; only where nobody gave the classes names the number alone counts.
        """
        pairs = zip(self.names, self.labels, strict=True)
        nameless = all(own in (str(number), f"LABEL_{number}") for own, number in pairs)
        said = label if name is None or nameless else name
        if said == label and label in self.labels:
            return list(self.labels).index(label)
        folded = [own.casefold() for own in self.names]
        return folded.index(said.casefold()) if isinstance(said, str) and said.casefold() in folded else None

    def as_ordered(self, names: Sequence[str]) -> Classes | None:
        """The same classes in a model's own order, where it has just these, whatever their case; else None."""
        own = [name.casefold() for name in self.names]
        try:
            order = [own.index(name.casefold()) for name in names]
        except ValueError:
            return None
        if sorted(order) != list(range(len(own))):
            return None
        counts = tuple(self.counts[i] for i in order) if self.counts else ()
        return Classes(tuple(self.names[i] for i in order), tuple(self.labels[i] for i in order), counts)

    def to_json(self) -> list[dict[str, Any]]:
        counts = self.counts or [None] * len(self)
        rows = zip(self.names, self.labels, counts, strict=True)
        return [{"name": name, "label": label, "count": count} for name, label, count in rows]

    @classmethod
    def of_json(cls, rows: Sequence[Mapping[str, Any]]) -> Classes:
        counts = tuple(row["count"] for row in rows)
        named = tuple(row["name"] for row in rows), tuple(row["label"] for row in rows)
        return cls(*named, () if None in counts else counts)


def label_of(fields: Mapping[str, Any]) -> tuple[Label, str | None]:
    """What a row says of its class: the label, and its name where the row has that too.

    Raises:
        ValueError: it is neither a whole number nor a name; says what it is.
    """
    label, name = fields[LABEL], fields.get(NAME)
    if isinstance(label, bool):
        label = str(label).lower()
    elif isinstance(label, float) and label.is_integer():  # tables make floats of columns with a gap
        label = int(label)
    elif isinstance(label, str):
        label = label.strip()
        label = int(label) if _NUMBER.fullmatch(label) else label
    if not isinstance(label, int | str) or label == "":
        raise ValueError(f"{LABEL} is {shown(fields[LABEL])}, expected a whole number or a name")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise ValueError(f"{NAME} is {shown(name)}, expected a name")
    return label, None if name is None else name.strip()


def find_classes(sources: str | Path | Sequence[str | Path], split: str = "train") -> Classes:
    """The classes of all rows: numbers in their order, names in alphabetical order.

    Raises:
        DataError: rows without a label, labels with two names or names with two labels, all listed; or fewer than two
            classes.
    """
    rows, firsts, problems = _labels(sources, split)
    counts: Counter[Label] = Counter()
    named: dict[Label, dict[str, None]] = {}
    for (label, name), count in rows.items():
        counts[label] += count
        named.setdefault(label, {}).update({name: None} if name else {})
    names = {label: next(iter(own), str(label)) for label, own in named.items()}
    for label, own in named.items():
        if len(own) > 1:
            first = firsts[label, list(own)[1]]
            problems.add(first, f"{LABEL} {label!r} is called {' and '.join(map(repr, own))}")
    for name, times in Counter(names.values()).items():
        if times > 1:
            same = [label for label, other in names.items() if other == name]
            problems.add(_where(sources), f"{NAME} {name!r} is that of {' and '.join(map(repr, same))}")
    problems.check()
    if len(names) < 2:
        what = f"all rows are {next(iter(names.values()))!r}" if names else "there is not one row"
        raise DataError(f"{_where(sources)}: nothing to tell apart: {what}", hint="classes are learnt from two or more")
    numbered = all(isinstance(label, int) for label in names)
    ordered = sorted(names, key=lambda label: (label if numbered else 0, names[label]))
    return Classes(tuple(names[label] for label in ordered), tuple(ordered), tuple(counts[label] for label in ordered))


def check_known(classes: Classes, sources: str | Path | Sequence[str | Path], split: str = "train") -> None:
    """That rows to be judged by are of classes that are learnt.

    Raises:
        DataError: lists the labels that are not, each with its rows and the first of them; or rows without a label.
    """
    rows, firsts, problems = _labels(sources, split)
    problems.check()
    unknown = [said for said in rows if classes.number(*said) is None]
    if unknown:
        lines = [
            f"{name or label!r}: {rows[label, name]:,} rows, first {firsts[label, name]}" for label, name in unknown
        ]
        raise DataError(
            f"{_where(sources)}: labels that are not among those learnt from:\n{listing(lines)}",
            hint=f"learnt are {', '.join(classes.names[:20])}{' …' if len(classes) > 20 else ''}",
        )


def _labels(
    sources: str | Path | Sequence[str | Path], split: str
) -> tuple[Counter[tuple[Label, str | None]], dict[tuple[Label, str | None], str], Problems]:
    """How many rows say what, and the first that does; what is wrong with rows is in the problems."""
    rows: Counter[tuple[Label, str | None]] = Counter()
    firsts: dict[tuple[Label, str | None], str] = {}
    problems = Problems()
    for source in [sources] if isinstance(sources, str | Path) else sources:
        for row in read_rows(source, split, problems):
            if row.fields.get(LABEL) is None:
                there = ", ".join(map(repr, row.fields)) or "none"
                hint = f"a row has a text, or two, and {LABEL!r}; rename the fields"
                problems.add(row.origin, f"has no {LABEL!r} (fields: {there})", hint=hint)
                continue
            try:
                said = label_of(row.fields)
            except ValueError as error:
                problems.add(row.origin, str(error))
                continue
            rows[said] += 1
            firsts.setdefault(said, str(row.origin))
    return rows, firsts, problems


def _where(sources: str | Path | Sequence[str | Path]) -> str:
    return str(sources) if isinstance(sources, str | Path) else ", ".join(map(str, sources))
