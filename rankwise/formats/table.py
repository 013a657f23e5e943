"""The formats of adapters, in one place, and which of them lies at a path: found out by looking."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import AdapterFileError, ModelError, listing
from rankwise.formats import diffusers, gguf, kohya, loralib, mlx, peft
from rankwise.formats.portable import Portable, Terms
from rankwise.planning.headers import read_header


@dataclass(frozen=True)
class Format:
    """One format: `read` gives an adapter, `write`, where there is one, takes it.

    Attributes:
        suffix: of its file; empty where it is a folder.
        of_model: whether nothing goes without an outline of the model.
    """

    name: str
    read: Callable[[Path, Terms], Portable]
    write: Callable[[Path, Portable, Terms], None] | None
    suffix: str = ""
    of_model: bool = False


def _read_peft(folder: Path, terms: Terms) -> Portable:
    """PEFT's folder, with what its config and the names of its tensors say beside the adapter."""
    adapter = peft.read_adapter(folder).plain()
    config = json.loads((folder / peft.CONFIG).read_text(encoding="utf-8"))
    keys = read_header(folder / peft.WEIGHTS)
    ends = {key.removeprefix("base_model.model.").removesuffix(".lora_embedding_A") for key in keys}
    return Portable(
        adapter,
        lookups=frozenset(ends & adapter.sites.keys()),
        transposed=bool(config.get("fan_in_fan_out")),
        base=config.get("base_model_name_or_path") or "",
        task=config.get("task_type"),
    ).known_on(terms.outline)


def _write_peft(folder: Path, portable: Portable, terms: Terms) -> None:
    own = portable.cast(terms.dtype)
    modules = tuple(terms.outline.layers) if terms.outline is not None else ()
    peft.write_adapter(folder, own.adapter, own.kinds(), modules, own.base, own.task)


FORMATS = {
    one.name: one
    for one in (
        Format("peft", _read_peft, _write_peft),
        Format("gguf", gguf.read_adapter, gguf.write_adapter, ".gguf", of_model=True),
        Format("diffusers", diffusers.read_adapter, diffusers.write_adapter, ".safetensors"),
        Format("kohya", kohya.read_adapter, kohya.write_adapter, ".safetensors"),
        Format("mlx", mlx.read_adapter, mlx.write_adapter),
        Format("loralib", loralib.read_adapter, None),
    )
}
WRITTEN = tuple(name for name, one in FORMATS.items() if one.write is not None)


def found_format(path: Path) -> tuple[Format, Path]:
    """What lies at a path, and the file or folder that its reader takes.

    Raises:
        AdapterFileError: nothing, or nothing that is known; says what was seen.
    """
    if not path.exists():
        raise AdapterFileError(f"{path}: no such file or folder")
    if path.is_dir():
        return _folder(path)
    if _begins_with(path, b"GGUF"):
        return FORMATS["gguf"], path
    if path.suffix == ".safetensors":
        return _tensors(path), path
    if path.suffix in loralib.PICKLED:
        found, rest = loralib.sorted_out(loralib.read_state(path))
        if found:
            return FORMATS["loralib"], path
        raise _unknown(path, rest)
    raise AdapterFileError(
        f"{path}: no format of adapters that is known: a file of {path.stat().st_size:,} bytes, neither GGUF nor named "
        f"{', '.join(('.safetensors', *loralib.PICKLED))}",
        hint=_KNOWN,
    )


_KNOWN = f"known are {', '.join(FORMATS)}: a folder of PEFT or mlx-lm, or a single file of the others"


def _folder(path: Path) -> tuple[Format, Path]:
    names = sorted(one.name for one in path.iterdir())
    if mlx.WEIGHTS in names:
        return FORMATS["mlx"], path
    if peft.CONFIG in names:
        return FORMATS["peft"], path
    files = [name for name in names if Path(name).suffix in (".safetensors", ".gguf", *loralib.PICKLED)]
    if len(files) == 1 or diffusers.FILE in files:
        return found_format(path / (diffusers.FILE if diffusers.FILE in files else files[0]))
    raise AdapterFileError(
        f"{path}: no format of adapters that is known; it holds:\n{listing(names) if names else '  nothing'}",
        hint=f"an adapter's folder has {peft.CONFIG}; of several files name one",
    )


def _tensors(path: Path) -> Format:
    """Told by how its keys are spelt."""
    try:
        keys = list(read_header(path))
    except ModelError as error:
        raise AdapterFileError(error.message, hint=error.hint) from None
    if any(key.startswith(tuple(kohya.PREFIXES)) for key in keys):
        return FORMATS["kohya"]
    if any(key.endswith((".lora_A", ".lora_B")) for key in keys):
        return FORMATS["loralib"]
    if any(key.startswith("base_model.model.") for key in keys) or path.name == mlx.WEIGHTS:
        raise AdapterFileError(f"{path}: the tensors of a folder, without its config", hint=f"name {path.parent}")
    if any(".lora_A." in key or ".lora." in key or "_lora." in key or ".lora_linear_layer." in key for key in keys):
        return FORMATS["diffusers"]
    raise _unknown(path, keys)


def _unknown(path: Path, keys: Iterable[str]) -> AdapterFileError:
    return AdapterFileError(
        f"{path}: no adapter of a format that is known; its tensors are called:\n{listing(keys, most=5) or '  (none)'}",
        hint=_KNOWN,
    )


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
