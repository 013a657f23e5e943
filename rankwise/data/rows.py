"""Rows out of files (JSON lines, JSON, CSV, TSV, Parquet) or a data set of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from rankwise.data.hub_rows import read_hub
from rankwise.data.json_rows import read_json, read_jsonl
from rankwise.data.problems import Problems
from rankwise.data.row import Origin, Row
from rankwise.data.table_rows import read_csv, read_parquet, read_tsv
from rankwise.errors import DataError, nearest

__all__ = ["Origin", "Row", "ending", "is_file", "read_rows"]

Reader = Callable[[Path, Problems], Iterator[Row]]
_TEXT: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
_READERS = _TEXT | {f"{ending}.gz": reader for ending, reader in _TEXT.items()} | {".parquet": read_parquet}


def read_rows(source: str | Path, split: str = "train", problems: Problems | None = None) -> Iterator[Row]:
    """Every row of a source, one after the other; memory does not grow with the file (`.json` is held as text).

    Args:
        source: a file ending in .jsonl, .ndjson, .json, .csv, .tsv (each also with .gz) or .parquet; or a data set's
            name on the Hugging Face hub, `name` or `name:config`.
        split: which split of a hub data set; files have none.
        problems: bad lines go here and reading goes on.  When it is left out they are raised after the last row.

    Raises:
        DataError: there is no such source, its kind is unknown, it is damaged; or, without `problems`, bad lines.
        MissingPackageError: a hub data set is named and `datasets` is not installed.
    """
    found = Problems() if problems is None else problems
    if is_file(source):
        yield from _READERS[ending(Path(source))](Path(source), found)
    else:
        yield from read_hub(str(source), split)
    if problems is None:
        found.check()


def is_file(source: str | Path) -> bool:
    """True for a data file, False for the name of a hub data set.

    Raises:
        DataError: it is neither: a file that does not exist, a folder, an unknown ending.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(child.name for child in path.iterdir() if ending(child) in _READERS)
        raise DataError(
            f"{path}: a folder, expected a file",
            hint=f"it holds {', '.join(files[:8])}" if files else "and it holds no data file",
        )
    known = ending(path) in _READERS
    if path.is_file() and not known:
        raise DataError(
            f"{path}: {ending(path) or 'no ending'!r} is no kind of data file{nearest(ending(path), list(_READERS))}",
            hint=f"one of {', '.join(_READERS)}",
        )
    if not path.exists() and (known or path.is_absolute()):
        beside = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(path.name, beside)}")
    return path.is_file()


def ending(path: Path) -> str:
    """The part of a file's name that says what it is: `.jsonl`, `.csv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])
