"""One row of the data, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a row begins: its file (as it was named) and its line; in Parquet and on the hub its number.  From 1.

    Where a whole JSON document stands on one line, its rows are numbered too, and `numbered` says so.
    """

    file: str
    line: int
    numbered: bool = False

    def __str__(self) -> str:
        return f"{self.file}: row {self.line}" if self.numbered else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        origin: where it begins.
        fields: its columns, as JSON values.
        read: share of its source read so far, 0 to 1, for the progress bar.
    """

    origin: Origin
    fields: dict[str, Any]
    read: float = 1.0
