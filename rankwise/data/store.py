"""A corpus on disk: four plain .npy files and a manifest, written as documents come and read through memory maps.

The folder is built under another name and renamed when whole.  The manifest is written last and holds the size and
SHA-256 of every file, so a folder that was cut short or damaged is recognised and refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy

from rankwise.data.corpus import Corpus
from rankwise.errors import DataError

SCHEMA = 1
_MANIFEST = "manifest.json"
_ARRAYS = ("tokens.npy", "supervised.npy", "bounds.npy", "origins.npy")  # in the order of Corpus
_BLOCK = 1 << 20


class CorpusWriter:
    """Appends documents to what becomes `folder`; memory does not grow with them.

    Use it in a `with`; without `finish` nothing is left behind.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._beside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
        paths = [self._beside / name for name in _ARRAYS]
        self._tokens = _GrowingArray(paths[0], np.int32)
        self._supervised = _GrowingArray(paths[1], np.bool_)
        self._bounds = _GrowingArray(paths[2], np.int64)
        self._origins = _GrowingArray(paths[3], np.int64, (2,))
        self._arrays = (self._tokens, self._supervised, self._bounds, self._origins)
        self._bounds.append([0])

    def append(self, tokens: np.ndarray, supervised: np.ndarray, origin: tuple[int, int]) -> None:
        """One document: its tokens and mask, and (file index, line number)."""
        self._tokens.append(tokens)
        self._supervised.append(supervised)
        self._bounds.append([self._tokens.length])
        self._origins.append([origin])

    def finish(self, files: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Writes the manifest and gives the folder its name.  `facts` are the caller's own, kept as JSON."""
        for array in self._arrays:
            array.close()
        sums = {array.path.name: _fingerprint(array.path) for array in self._arrays}
        manifest = {"schema": SCHEMA, "files": list(files), "sums": sums, "facts": dict(facts)}
        path = self._beside / _MANIFEST
        with path.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        if _whole(self._folder, sums):
            return  # another process wrote the same content in the meantime, and may be reading it
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._beside.rename(self._folder)
        except OSError:
            if not (self._folder / _MANIFEST).exists():
                raise
            # Another process wrote the same content in the meantime; its folder is as good.

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for array in self._arrays:
            array.discard()
        shutil.rmtree(self._beside, ignore_errors=True)  # gone already when it was finished


def _whole(folder: Path, sums: dict[str, list[Any]]) -> bool:
    """Whether a folder holds these very arrays."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        same = manifest["schema"] == SCHEMA and manifest["sums"] == sums
        return same and all(_fingerprint(folder / name) == sums[name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_corpus(corpus: Corpus, folder: Path) -> None:
    """Writes a corpus so that `open_corpus` reads the same bytes."""
    with CorpusWriter(folder) as writer:
        for i in range(len(corpus)):
            file, line = corpus.origins[i]
            writer.append(*corpus.document(i), (int(file), int(line)))
        writer.finish(corpus.files, {})


def open_corpus(folder: Path) -> tuple[Corpus, dict[str, Any]]:
    """The corpus in a folder, memory-mapped, and the facts stored with it.

    Raises:
        DataError: there is none, or it is not what was written.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise DataError(f"{folder}: schema {manifest['schema']!r}, this version reads {SCHEMA}")
        for name in _ARRAYS:
            if _fingerprint(folder / name) != manifest["sums"][name]:
                raise DataError(f"{folder / name}: not what was written; it is damaged")
        tokens, supervised, bounds, origins = (np.load(folder / name, mmap_mode="r") for name in _ARRAYS)
        return Corpus(tokens, supervised, bounds, origins, tuple(manifest["files"])), manifest["facts"]
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a stored corpus: {error!r}") from None


class _GrowingArray:
    """A .npy file that is appended to.

    The header is written first for no rows and again at the end; numpy pads it so that the length of the first axis
    can grow in place.
    """

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...] = ()) -> None:
        self.path, self.length = path, 0
        self._dtype, self._shape = np.dtype(dtype), shape
        self._file = path.open("wb")
        self._write_header()

    def append(self, rows: Any) -> None:
        block = np.ascontiguousarray(rows, dtype=self._dtype)
        self._file.write(block.data)
        self.length += len(block)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Lets go of the file, whole or not; on a full disk even that is an error, and of no interest any more."""
        with suppress(OSError):
            self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length, *self._shape)}
        npy.write_array_header_1_0(self._file, header)


def _fingerprint(path: Path) -> list[Any]:
    """Size and SHA-256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha.update(block)
    return [path.stat().st_size, sha.hexdigest()]
