"""A folder that is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rankwise.errors import RunFolderError


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder of the same name that takes the place of `out` when all has gone well, and is gone when not.

    Raises:
        RunFolderError: `out` exists and is not an empty folder, or cannot be written.
    """
    beside = out.parent / f".{out.name}.part"
    place = beside / out.name  # pages that are written there name the folder
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunFolderError(f"{out}: not an empty folder; nothing was overwritten", hint="choose another --out")
        shutil.rmtree(beside, ignore_errors=True)
        place.mkdir(parents=True)
        yield place
        for path in place.iterdir():
            path.chmod(0o644)  # safetensors makes files that their owner alone can read
        if out.exists():
            out.rmdir()
        place.rename(out)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise RunFolderError(f"{out}: cannot be written: {error}", hint="make room, or choose another --out") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
