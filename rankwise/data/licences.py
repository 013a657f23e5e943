"""Which installed packages may be learnt from: those under a permissive licence, by their own metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePosixPath

_PERMISSIVE = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "PSF-2.0",
    "Python-2.0",
    "Zlib",
}
# The same licences in the words of old metadata, and the words that make a licence something else.
_WORDS = {
    "MIT": r"\bMIT\b",
    "Apache-2.0": r"\bApache\b.*2\.0|Apache Software License",
    "BSD-3-Clause": r"\bBSD\b",
    "PSF-2.0": r"\bPSF\b|Python Software Foundation",
}
_OTHERS = re.compile(r"GPL|GNU|MPL|Mozilla|EUPL|CC.BY|proprietary|commercial", re.IGNORECASE)


@dataclass(frozen=True)
class Library:
    """Python source under one licence.

    Attributes:
        name: of the package.
        licence: SPDX expression.
        root: the folder its files are named from.
        list_files: paths of its modules, relative to `root`, sorted; asked for only when the library is read.
    """

    name: str
    licence: str
    root: Path
    list_files: Callable[[], list[PurePosixPath]]


def permissive_packages(site: Sequence[str] | None = None) -> Iterator[Library]:
    """Installed packages under MIT, BSD, Apache-2.0, PSF or as free a licence; `site` are folders to look in."""
    found = distributions(path=list(site)) if site is not None else distributions()
    by_name = {name: distribution for distribution in found if (name := _field(distribution, "Name"))}
    for name in sorted(by_name):
        distribution = by_name[name]
        if licence := licence_of(distribution):
            root = Path(str(distribution.locate_file("")))
            yield Library(name, licence, root, partial(_modules, distribution))


def _modules(distribution: Distribution) -> list[PurePosixPath]:
    return sorted(file for file in distribution.files or () if file.suffix == ".py" and ".." not in file.parts)


def licence_of(distribution: Distribution) -> str | None:
    """The SPDX expression of a permissive licence, or None where the licence is another, or unknown."""
    if expression := _field(distribution, "License-Expression"):
        parts = re.findall(r"[\w.+-]+", re.sub(r"\b(AND|OR|WITH)\b", " ", expression))
        return expression if parts and set(parts) <= _PERMISSIVE else None
    classifiers = [c for c in distribution.metadata.get_all("Classifier") or () if c.startswith("License ::")]
    # A free text may be the whole licence; its first line names it.
    stated = classifiers or _field(distribution, "License").strip().splitlines()[:1]
    names = [_named(text) for text in stated]
    return " AND ".join(sorted({name for name in names if name})) if names and all(names) else None


def _field(distribution: Distribution, name: str) -> str:
    """A field of the metadata, or nothing; what indexing does about a missing one differs between Pythons."""
    return next(iter(distribution.metadata.get_all(name) or ()), "")


def _named(text: str) -> str | None:
    if _OTHERS.search(text):
        return None
    return next((name for name, words in _WORDS.items() if re.search(words, text)), None)
