"""Pictures out of a folder with a folder for each class, or out of the arrays of an .npz file.

An .npz holds, for each of its parts (`train`, `valid`, `test`, …), `x_<part>`, uint8 `[D, height, width]` or
`[D, height, width, channels]`, and `y_<part>`, whole numbers `[D]`; and it may hold `class_names`.  `file.npz:part`
names a part; without, it is the one that is wanted.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from rankwise.cache import cache_folder
from rankwise.data.classes import Classes
from rankwise.data.intake import Report
from rankwise.data.pictures import Look, Pictures
from rankwise.data.prepare import Prepared, Progress
from rankwise.data.problems import Problems
from rankwise.errors import DataError, nearest

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_NPZ = ".npz"


@dataclass(frozen=True)
class _Found:
    """One picture of a source: what its class is called, how to open it, and where it stands."""

    name: str
    file: int
    line: int


class PictureSource:
    """A folder or an .npz file, looked at but not yet read.

    Args:
        source: a folder of class folders, `file.npz` or `file.npz:part`.
        part: which part of an .npz is wanted where none is named: `train`, `valid` or `test`.

    Raises:
        DataError: there is no such thing, it holds no pictures, or not as it should.
    """

    def __init__(self, source: str, part: str = "train") -> None:
        self.source = source
        path, _, named = source.partition(f"{_NPZ}:")
        self.path = Path(f"{path}{_NPZ}" if named else source)
        self.arrays: dict[str, np.ndarray] | None = None
        if self.path.is_dir():
            self._look_at_folder()
        elif self.path.suffix.lower() == _NPZ and self.path.is_file():
            self._open_arrays(named, part)
        else:
            raise DataError(
                f"{source}: no such folder of pictures, nor an {_NPZ} file",
                hint=f"a folder holds a folder for each class; an {_NPZ} file x_train, y_train and class_names",
            )

    def _look_at_folder(self) -> None:
        folders = sorted(child for child in self.path.iterdir() if child.is_dir() and not child.name.startswith("."))
        self.names: tuple[str, ...] = tuple(folder.name for folder in folders)
        self.files: list[str] = []
        self.pictures: list[_Found] = []
        strangers = []
        for folder in folders:
            for file in sorted(folder.iterdir()):
                if file.suffix.lower() in ENDINGS and file.is_file():
                    self.pictures.append(_Found(folder.name, len(self.files), 0))
                    self.files.append(str(file))
                elif file.is_dir():
                    strangers.append(file)
        if not self.pictures:
            inner = f"; {strangers[0].parent} holds folders of its own: name that one" if strangers else ""
            raise DataError(
                f"{self.path}: no pictures in folders of classes{inner}", hint=f"endings: {', '.join(ENDINGS)}"
            )

    def _open_arrays(self, named: str, part: str) -> None:
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                held = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path}: cannot be read: {error}", hint="copy or download it again") from None
        parts = [name.removeprefix("x_") for name in held if name.startswith("x_")]
        wanted = named or (part if part in parts or len(parts) != 1 else parts[0])
        if wanted not in parts or f"y_{wanted}" not in held:
            raise DataError(
                f"{self.path}: has no x_{wanted} and y_{wanted}{nearest(wanted, parts)}",
                hint=f"its arrays: {', '.join(held) or 'none'}; FILE{_NPZ}:PART names a part",
            )
        x, y = held[f"x_{wanted}"], held[f"y_{wanted}"]
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
            raise DataError(
                f"{self.path}: x_{wanted} is {x.dtype} {x.shape}, expected uint8 [D, height, width(, 1 or 3)]"
            )
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise DataError(f"{self.path}: y_{wanted} is {y.dtype} {y.shape}, expected {len(x)} whole numbers")
        names = held.get("class_names")
        if names is not None and len(y) and int(y.max()) >= len(names):
            raise DataError(f"{self.path}: label {int(y.max())} in y_{wanted}, but {len(names)} class_names")
        called = (
            [str(number) for number in range(int(y.max(initial=-1)) + 1)] if names is None else list(map(str, names))
        )
        self.names = tuple(called)
        self.files = [self.source]
        self.pictures = [_Found(called[label], 0, line) for line, label in enumerate(y.tolist(), start=1)]
        self.arrays = {"x": x}

    def classes(self) -> Classes:
        """Of the pictures to learn from: all that are named there.

        Raises:
            DataError: fewer than two, or one without a picture.
        """
        counts = Counter(found.name for found in self.pictures)
        empty = [name for name in self.names if not counts[name]]
        if len(self.names) < 2 or empty:
            what = f"no picture of {', '.join(empty)}" if empty else f"all pictures are {', '.join(self.names)}"
            raise DataError(f"{self.source}: {what}", hint="two classes or more are told apart, each with pictures")
        numbers = tuple(range(len(self.names)))
        return Classes(self.names, numbers, tuple(counts[name] for name in self.names))

    def counts(self, classes: Classes) -> tuple[int, ...]:
        """How many pictures of each."""
        counts = Counter(found.name for found in self.pictures)
        return tuple(counts[name] for name in classes.names)

    def check_known(self, classes: Classes) -> None:
        """That pictures to be judged by are of classes that are learnt.

        Raises:
            DataError: lists the classes that are not.
        """
        counts = Counter(found.name for found in self.pictures)
        unknown = [f"{name!r} ({count:,} pictures)" for name, count in counts.items() if name not in classes.names]
        if unknown:
            raise DataError(
                f"{self.source}: classes that are not among those learnt from: {', '.join(unknown)}",
                hint=f"learnt are {', '.join(classes.names)}",
            )

    def opened(self) -> Iterator[Any]:
        """The pictures as Pillow has them, one after the other.

        Raises:
            DataError: lists the files that are no pictures.
        """
        problems = Problems()
        for found in self.pictures:
            if self.arrays is not None:
                x = self.arrays["x"][found.line - 1]
                yield Image.fromarray(x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x)
                continue
            try:
                with Image.open(self.files[found.file]) as picture:
                    picture.load()
                    yield picture
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
                problems.add(self.files[found.file], f"no picture that can be read: {error}")
        problems.check()

    def digest(self) -> str:
        """SHA-256 of all bytes and classes."""
        sha = hashlib.sha256(json.dumps([found.name for found in self.pictures]).encode())
        if self.arrays is not None:
            sha.update(np.ascontiguousarray(self.arrays["x"]).data)
        else:
            for file in self.files:
                sha.update(Path(file).read_bytes())
        return sha.hexdigest()


def read_pictures(
    sources: str | Sequence[str],
    look: Look,
    classes: Classes,
    *,
    part: str = "train",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Every picture at the size that a model wants, kept in the cache and mapped into memory.

    Args:
        sources: see `PictureSource`.
        look: of the model.
        classes: of the pictures that are learnt from.
        part: of an .npz.
        cache: folder; by default `~/.cache/rankwise/pictures`.
        progress: told pictures done, and the share of all.

    Raises:
        DataError: no pictures, some that cannot be read (all listed), or of classes that are not known.
    """
    found = [PictureSource(source, part) for source in ([sources] if isinstance(sources, str) else sources)]
    for source in found:
        source.check_known(classes)
    files = {source.source: source.digest() for source in found}
    whole = hashlib.sha256(json.dumps([list(files.values()), look.digest]).encode()).hexdigest()[:40]
    place = (cache or cache_folder() / "pictures") / f"{whole}.npy"
    if not place.exists():
        _keep(place, found, look, progress)
    pictures = [(source, one) for source in found for one in source.pictures]
    begins = np.cumsum([0, *(len(source.files) for source in found)])
    offsets = {id(source): int(begin) for source, begin in zip(found, begins, strict=False)}
    origins = [(offsets[id(source)] + one.file, one.line) for source, one in pictures]
    labels = [classes.names.index(one.name) for _, one in pictures]
    examples = Pictures(
        np.load(place, mmap_mode="r"),
        np.asarray(labels, dtype=np.int64),
        classes.names,
        look,
        np.asarray(origins, dtype=np.int64).reshape(-1, 2),
        tuple(file for source in found for file in source.files),
    )
    count = len(examples)
    report = Report(count, count, count * look.tokens, count, 0, {}, {"picture": count}, {}, files)
    return Prepared(examples, report, reused=False)


def _keep(place: Path, found: Sequence[PictureSource], look: Look, progress: Progress | None) -> None:
    """Writes the array beside its place and renames it in."""
    count = sum(len(source.pictures) for source in found)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".part-", suffix=".npy", delete=False) as file:
        beside = Path(file.name)
    try:
        pixels: Any = None
        for i, picture in enumerate(picture for source in found for picture in source.opened()):
            own = look.resized(picture)
            if pixels is None:
                pixels = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=(count, *own.shape))
            if own.shape != pixels.shape[1:] or own.dtype != np.uint8:
                raise DataError(
                    f"a picture comes out {own.shape} and another {pixels.shape[1:]}",
                    hint="the model's processor has to bring pictures to one size",
                )
            pixels[i] = own
            if progress is not None and i % 64 == 0:
                progress(i, i / count)
        if pixels is None:
            raise DataError("there is not one picture")
        pixels.flush()
        del pixels
        beside.replace(place)
    except OSError as error:
        raise DataError(f"{place}: the pictures cannot be written: {error}", hint="free some space") from None
    finally:
        with suppress(OSError):
            beside.unlink()
