"""What an adapter folder or a model holds: what `rankwise inspect` does.  An adapter is read without its base."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rankwise.adapters.presets import TARGET_ROLES
from rankwise.errors import ModelError
from rankwise.formats.peft import CONFIG, read_adapter, stated_task
from rankwise.formats.record import is_whole, read_record
from rankwise.frozen.load import read_outline
from rankwise.surgery.sites import find_sites
from rankwise.tasks import DEFAULT


def run_inspection(what: str, task: str | None = None) -> dict[str, Any]:
    """Of an adapter: sites with rank, scale and ‖ΔW‖, and the base it expects.  Of a model: its sites by role.

    Without the base nobody knows ‖ΔW‖ of form `dora`: it is None then, and `changes_nothing` False.

    Of a model that was trained whole also `trained`: which base it was, and how it was trained.

    Args:
        what: an adapter's folder, or a model's folder or id.
        task: what a model is to be loaded for; by default what its checkpoint was made for.

    Raises:
        AdapterFileError: the folder holds an adapter that cannot be read.
        ModelError: it is neither an adapter's folder nor a model that can be found.
    """
    folder = Path(what).expanduser()
    if is_whole(folder):
        return _model(what, task) | {"trained": _trained(folder)}
    return _adapter(folder) if (folder / CONFIG).exists() else _model(what, task)


def _adapter(folder: Path) -> dict[str, Any]:
    adapter, record = read_adapter(folder), read_record(folder)
    sites = {
        path: {
            "rank": factors.rank,
            "scale": factors.scale,
            "shape": [factors.shape.outputs, factors.shape.inputs, *factors.shape.kernel],
            "delta_norm": None if factors.m is not None else factors.delta_norm(),  # which is another with W
        }
        for path, factors in adapter.sites.items()
    }
    bare = not adapter.modules and not adapter.tokens
    moved = any(site["delta_norm"] is None or site["delta_norm"] for site in sites.values())
    return {
        "kind": "adapter",
        "path": str(folder),
        "task": record.get("task", DEFAULT) if record is not None else stated_task(folder),
        "classes": [row["name"] for row in record.get("classes", [])] if record is not None else [],
        "parameters": adapter.parameter_count(),
        "digest": adapter.digest(),
        "spec": adapter.spec.model_dump(mode="json"),
        "changes_nothing": bare and not moved,
        "base": record["base"] if record is not None else _named_base(folder),
        "training": record.get("training") if record is not None else None,
        "modules": sorted(adapter.modules),
        "tokens": {path: rows.tokens for path, rows in adapter.tokens.items()},
        "nested": list(adapter.nested),
        "sites": sites,
    }


def _trained(folder: Path) -> dict[str, Any]:
    """What the record of a model says that was trained whole."""
    record = read_record(folder) or {}
    known = {name: record.get(name) for name in ("base", "digest", "parameters", "training")}
    classes = [row["name"] for row in record.get("classes", [])]
    return {"task": record.get("task", DEFAULT), "classes": classes, **known}


def _named_base(folder: Path) -> dict[str, Any] | None:
    """What another tool wrote down of the base: its name, which proves nothing."""
    name = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return {"name": name, "fingerprint": None} if name else None


def _model(source: str, task: str | None) -> dict[str, Any]:
    """From the config alone: the model is built without memory for its weights."""
    try:
        model = read_outline(source, task)
    except ModelError as error:
        raise ModelError(
            f"{source}: neither an adapter's folder nor a model that can be read: {error.message}",
            hint=f"an adapter's folder holds {CONFIG}, a model's config.json",
        ) from None
    sites = find_sites(model)
    presets = {}
    for preset, roles in TARGET_ROLES.items():
        chosen = [site for site in sites.values() if site.role in roles]
        presets[preset] = {
            "layers": sorted({site.path.rsplit(".", 1)[-1] for site in chosen}),
            "sites": len(chosen),
            "parameters_per_rank": sum(site.shape.parameters(1) for site in chosen),
        }
    return {
        "kind": "model",
        "path": source,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "roles": dict(Counter(site.role for site in sites.values())),
        "presets": presets,
        "sites": {
            path: {"role": site.role, "shape": [site.shape.outputs, site.shape.inputs, *site.shape.kernel]}
            for path, site in sites.items()
        },
    }
