"""Rows out of tables: CSV and TSV with a header line, Parquet."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from rankwise.data.lines import Line, read_lines
from rankwise.data.problems import Problems
from rankwise.data.row import Origin, Row
from rankwise.errors import DataError

_LONGEST_FIELD = 2**31 - 1  # the most that fits a C long everywhere
_PARQUET_ROWS = 64


def read_csv(path: Path, problems: Problems) -> Iterator[Row]:
    return _read_separated(path, problems, ",")


def read_tsv(path: Path, problems: Problems) -> Iterator[Row]:
    return _read_separated(path, problems, "\t")


def _read_separated(path: Path, problems: Problems, delimiter: str) -> Iterator[Row]:
    # Python's limit of 128 KiB a field is for the whole process and knows no other way to be raised.
    csv.field_size_limit(_LONGEST_FIELD)
    cursor = _Cursor(read_lines(path, problems))
    table = csv.reader(cursor, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begins = 1
    try:
        for values in table:
            origin, begins = Origin(str(path), begins), table.line_num + 1
            if not values:
                continue
            if header is None:
                header = values
                if not _is_header(header, origin, problems):
                    return
            elif len(values) != len(header):
                problems.add(origin, f"{len(values)} fields, the header has {len(header)} ({', '.join(header)})")
            else:
                yield Row(origin, dict(zip(header, values, strict=True)), cursor.read)
    except csv.Error as error:
        problems.add(Origin(str(path), begins), f"not a row of a table: {error}", hint="quotes must open and close")


class _Cursor:
    """Hands a table reader its lines and remembers how far it has come."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.read = 0.0

    def __iter__(self) -> _Cursor:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.read = line.read
        return line.text.replace("\0", "")  # noted as a problem already, and no table reader takes it


def _is_header(header: list[str], origin: Origin, problems: Problems) -> bool:
    twice = [name for name, times in Counter(header).items() if times > 1]
    if twice:
        problems.add(origin, f"the header names {', '.join(map(repr, twice))} more than once")
    return not twice


def read_parquet(path: Path, problems: Problems) -> Iterator[Row]:
    """Row groups are read in small batches; `problems` is unused, a Parquet file is whole or damaged.

    Raises:
        DataError: the file is damaged or not Parquet.
    """
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            total, number = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(Origin(str(path), number), fields, number / total)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}", hint="copy or download it again") from None
