"""Names, shapes and types of the tensors in safetensors files, from their first bytes: no weight is read.

A file is 8 bytes (the header's length, little-endian), the header (JSON), and the data.  Nothing in the header is
believed before it has been held against the size of the file.  Format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import ModelError, listing

_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("F4",), 4),
}


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its shape, its type as safetensors names it (`BF16`), and its bytes."""

    shape: tuple[int, ...]
    dtype: str
    size: int


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model's folder by name; empty where it holds no safetensors file.

    An index (`model.safetensors.index.json`) says which files belong together; without one `model.safetensors` alone
    counts, or every safetensors file where there is none of that name.

    Raises:
        ModelError: a file that the index names is missing, two hold the same tensor, or a header lies.
    """
    found: dict[str, Stored] = {}
    for path in _files(folder):
        tensors = read_header(path)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise ModelError(
                f"{path}: holds tensors that another file of the folder holds too:\n{listing(twice)}",
                hint="keep the files that belong together, and their index, in a folder of their own",
            )
        found |= tensors
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file by name.

    Raises:
        ModelError: it is no safetensors file, is cut short, or its header claims what cannot be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
            if length > min(_LARGEST_HEADER, size - 8):
                raise _lie(path, f"it begins with a header of {length:,} bytes, in a file of {size:,}")
            header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise _lie(path, f"its header cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise _lie(path, "its header is no table of tensors")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry) for name, entry in header.items()}
    _check_places(path, header, size - 8 - length)
    return tensors


def _files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        return [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [folder / Path(name).name for name in named]  # a name, never a way out of the folder
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of weights: {error}", hint="download it again") from None
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ModelError(
            f"{index}: names files that are not there:\n{listing(missing)}",
            hint="download the rest, or take the index away to plan from config.json alone",
        )
    return paths


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _stored(path: Path, name: str, entry: Any) -> Stored:
    """One entry, if it can be true by itself."""
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _lie(path, f"{name!r} has no dtype, shape and pair of offsets") from None
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    if not whole or kind not in _BITS:
        raise _lie(path, f"{name!r} has type {kind!r}, shape {shape!r}, offsets {start!r} to {stop!r}")
    size = -(-math.prod(shape) * _BITS[kind] // 8)
    if stop - start != size:
        raise _lie(path, f"{name!r} of type {kind}, shape {shape} takes {size:,} bytes, not {stop - start:,}")
    return Stored(tuple(shape), kind, size)


def _check_places(path: Path, header: dict[str, Any], room: int) -> None:
    """The data lie one behind the other and fill the file."""
    end = 0
    for start, stop, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
        if start != end:
            raise _lie(path, f"{name!r} begins at byte {start:,} of the data, expected {end:,}")
        end = stop
    if end != room:
        raise _lie(path, f"its tensors take {end:,} bytes, the file has room for {room:,}")


def _lie(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: not a whole safetensors file: {what}", hint="copy or download it again")
