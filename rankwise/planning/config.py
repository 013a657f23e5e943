"""A model's config.json and, where they lie beside it, the headers of its weights; without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import ModelError
from rankwise.planning.headers import Stored, read_headers

_LARGEST_CONFIG = 10_000_000  # bytes; the longest configs have tens of thousands
_WAY_OUT = "give a folder that holds config.json, the file itself, or a model's id on the hub"


@dataclass(frozen=True)
class Described:
    """What is known of a model without loading it; `headers` is empty where there are no weights."""

    name: str
    config: Mapping[str, Any]
    headers: Mapping[str, Stored]


def describe(name: str | Path) -> Described:
    """A model's config and headers, from a folder, a config.json, or an id on the hub.

    Of an id the hub's cache is asked first, then the hub for config.json alone.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return Described(str(path), _read(path), {})
    if path.is_dir():
        return Described(str(path), _read(path / "config.json"), read_headers(path))
    if path.is_absolute() or str(name).startswith((".", "~")):
        raise ModelError(f"{name}: no such folder", hint=_WAY_OUT)
    found = _from_hub(str(name))
    return Described(str(name), _read(found), read_headers(found.parent) if _is_whole(found.parent) else {})


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, "config.json"))
    except (OSError, ValueError, HFValidationError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{name}: its config.json cannot be had: {first}", hint=_WAY_OUT) from None


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the hub's cache has every file its index names: a download may have been cut short."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return True
    try:
        return all((folder / name).exists() for name in json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ModelError(f"{path}: {path.stat().st_size:,} bytes are no config", hint=_WAY_OUT)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: not a config that can be read: {error}", hint=_WAY_OUT) from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a table of settings, found {type(found).__name__}", hint=_WAY_OUT)
    return found
