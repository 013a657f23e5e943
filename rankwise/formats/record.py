"""rankwise.json: what PEFT's config has no place for.  Closed schema, versioned, written last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.scaling import alpha_of
from rankwise.errors import AdapterFileError, AdapterMismatchError
from rankwise.formats.tensors import write_text

RECORD = "rankwise.json"
WHOLE = "full"  # in the place of an adapter's form
SCHEMA = 1


def describe(adapter: Adapter, base: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The record of an adapter.

    Args:
        base: its `name`, its `fingerprint`, its `vocabulary`: the rows of tokens that the fingerprint is of, and its
            `storage`: how its weights were held.
        facts: the run's own (data digests, template hash, metrics).
    """
    return {
        "schema": SCHEMA,
        "spec": adapter.spec.model_dump(mode="json"),
        "base": base,
        "digest": adapter.digest(),
        "parameters": adapter.parameter_count(),
        "sites": {
            path: {"rank": f.rank, "scale": f.scale, "alpha": alpha_of(adapter.spec.scaling, f.scale, f.rank)}
            for path, f in adapter.sites.items()
        },
        "modules": sorted(adapter.modules),
        "tokens": {path: rows.tokens for path, rows in adapter.tokens.items()},
        **({"nested": list(adapter.nested)} if adapter.nested else {}),
        **facts,
    }


def describe_whole(parameters: int, digest: str, base: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The record of a model whose weights were all trained; `digest` is its fingerprint, `base` that it was before."""
    return {
        "schema": SCHEMA,
        "spec": {"form": WHOLE},
        "base": base,
        "digest": digest,
        "parameters": parameters,
        "sites": {},
        **facts,
    }


def is_whole(folder: Path) -> bool:
    """Whether a folder holds such a model, as its record says.

    Raises:
        AdapterFileError: as `read_record`.
    """
    spec = (read_record(folder) or {}).get("spec")
    return isinstance(spec, dict) and spec.get("form") == WHOLE


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record beside an adapter, or None where another tool wrote it.

    Raises:
        AdapterFileError: it is not JSON, or of a schema newer than this version knows.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema, base = record["schema"], record.get("base")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{path}: not a rankwise record: {error!r}") from None
    if schema != SCHEMA:
        raise AdapterFileError(f"{path}: schema {schema!r}, this version reads {SCHEMA}", hint="update rankwise")
    if not isinstance(base, dict) or not {"name", "fingerprint"} <= base.keys() or not _counts(base.get("vocabulary")):
        raise AdapterFileError(f"{path}: not a rankwise record: it does not say of which base")
    return record


def nested_ranks(folder: Path) -> tuple[int, ...]:
    """The ranks at which an adapter was trained, as its record says, where every prefix of them is an adapter; else ().

    Raises:
        AdapterFileError: as `read_record`, or it says so of no ranks.
    """
    told = (read_record(folder) or {}).get("nested", [])
    if not isinstance(told, list) or not all(type(rank) is int and rank > 0 for rank in told):
        raise AdapterFileError(f"{folder / RECORD}: not a rankwise record: nested is {told!r}, and no list of ranks")
    return tuple(sorted(told))


def _counts(vocabulary: Any) -> bool:
    """Records from before there were tokens of adapters say nothing of it."""
    return vocabulary is None or (type(vocabulary) is int and vocabulary >= 0)


def check_base(record: dict[str, Any] | None, fingerprint: str, folder: Path) -> None:
    """Whether the base at hand is the one the adapter was trained on; without a record nobody knows.

    Raises:
        AdapterMismatchError: its weights are others.
    """
    if record is None or record["base"]["fingerprint"] == fingerprint:
        return
    raise AdapterMismatchError(
        f"{folder}: trained on {record['base']['name']!r} with fingerprint {record['base']['fingerprint'][:12]}…, "
        f"this base has {fingerprint[:12]}…",
        hint="use that base; to load it onto this one all the same, say force=True (--force)",
    )
