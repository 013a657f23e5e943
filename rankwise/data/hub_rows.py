"""Rows of a data set on the Hugging Face hub, through the optional package `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rankwise.data.row import Origin, Row
from rankwise.errors import DataError, MissingPackageError, nearest

_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def read_hub(source: str, split: str) -> Iterator[Row]:
    """Every row of one split; `source` is `name` or `name:config`.

    Raises:
        DataError: that is no name, there is no such data set, configuration or split, or it cannot be reached.
        MissingPackageError: `datasets` is not installed.
    """
    if not _NAME.fullmatch(source):
        raise DataError(f"{source!r}: no such file, and not the name of a data set on the hub")
    try:
        # Late: an optional package, wanted only when a data set is named instead of a file.
        import datasets
    except ImportError:
        raise MissingPackageError(
            f"{source!r}: no such file; to read it as a data set of the Hugging Face hub, `datasets` is needed",
            hint="pip install 'rankwise[hub]'",
        ) from None
    name, _, config = source.partition(":")
    try:
        parts = datasets.load_dataset(name, config or None)
    except (OSError, ValueError) as error:  # not found, not reachable, unknown configuration
        raise DataError(f"{source!r}: neither a file here nor a data set that can be loaded: {error}") from None
    if split not in parts:
        known = list(parts)
        raise DataError(
            f"{source!r} has no split {split!r}{nearest(split, known)}", hint=f"its splits: {', '.join(known)}"
        )
    rows = parts[split]
    for number, fields in enumerate(rows, start=1):
        yield Row(Origin(source, number), fields, number / len(rows))
