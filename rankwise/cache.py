"""Where things that can be made again are kept: `~/.cache/rankwise`, or a temporary folder where that is closed."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """A folder that can be written; the same on every call."""
    return _writable(Path.home() / ".cache" / "rankwise")


@cache
def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        temporary = Path(tempfile.mkdtemp(prefix="rankwise-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return temporary
