"""Lines of a text file as strict UTF-8, each with its number; what is not UTF-8 is named by line and byte."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from rankwise.data.problems import Problems
from rankwise.errors import DataError

_UTF8_MARK = b"\xef\xbb\xbf"
_WIDE_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# From the strict, small code pages to the one that takes any byte: the first that decodes a line is the likeliest.
_LIKELY = {
    "gb2312": "GBK",
    "big5": "BIG5",
    "shift_jis": "SHIFT_JIS",
    "euc_kr": "EUC-KR",
    "gb18030": "GB18030",
    "cp1252": "WINDOWS-1252",
}


@dataclass(frozen=True)
class Line:
    """One line with its newline.

    Attributes:
        number: from 1.
        text: where bytes could not be decoded, with replacement characters.
        read: share of the file read so far, 0 to 1.
        sound: False when a problem with its bytes has been noted already.
    """

    number: int
    text: str
    read: float
    sound: bool = True


def read_lines(path: Path, problems: Problems) -> Iterator[Line]:
    """The lines of a file, plain or gzipped.  Only LF ends a line; a CR before it stays for the caller to strip.

    Raises:
        DataError: the file cannot be opened, is UTF-16, or its gzip stream is damaged.
    """
    offset = 0
    with _opened(path) as (file, raw):
        size = max(1, path.stat().st_size)
        for number, data in enumerate(file, start=1):
            if number == 1:
                _refuse_wide(path, data)
                skipped = len(_UTF8_MARK) if data.startswith(_UTF8_MARK) else 0
                data, offset = data[skipped:], skipped
            yield _decoded(path, number, offset, data, min(1.0, raw.tell() / size), problems)
            offset += len(data)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The stream of bytes, and the file whose position tells how much has been read."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".gz":
                with gzip.open(raw, "rb") as unpacked:
                    yield cast(BinaryIO, unpacked), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}", hint="copy or download it again") from None


def _refuse_wide(path: Path, data: bytes) -> None:
    name = next((name for mark, name in _WIDE_MARKS.items() if data.startswith(mark)), None)
    if name is None and data[1:2] == b"\0":  # ASCII in UTF-16 without a mark: every other byte is NUL
        name = "UTF-16LE"
    if name:
        raise DataError(f"{path}:1:1: the file is {name}, expected UTF-8", hint=_conversion(path, name))


def _decoded(path: Path, number: int, offset: int, data: bytes, read: float, problems: Problems) -> Line:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{path}:{number}:{error.start + 1}"
        encoding = _likely_encoding(data)
        problems.add(
            place,
            f"byte 0x{data[error.start]:02x} is not UTF-8 (offset {offset + error.start:,} of the file); "
            f"the line looks like {encoding}",
            hint=_conversion(path, encoding),
        )
        return Line(number, data.decode("utf-8", errors="replace"), read, sound=False)
    if "\0" in text:
        at = data.index(b"\0")
        problems.add(
            f"{path}:{number}:{at + 1}",
            f"a NUL byte (offset {offset + at:,} of the file), expected text",
            hint="a crash or a full disk leaves NULs behind; take the line out or write the file again",
        )
        return Line(number, text, read, sound=False)
    return Line(number, text, read)


def _likely_encoding(data: bytes) -> str:
    for codec, name in _LIKELY.items():
        try:
            data.decode(codec)
        except UnicodeDecodeError:
            continue
        return name
    return "no common encoding"


def _conversion(path: Path, encoding: str) -> str:
    if " " in encoding:
        return "write the file again as UTF-8"
    return f"convert it once: iconv -f {encoding} -t UTF-8 {path} > utf8-{path.name}"
