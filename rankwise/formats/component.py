"""The models that a diffusion pipeline is made of, one of which an adapter's folder is for; diffusers' own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import AdapterFileError, SpecError, nearest

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
_BEGINNINGS = {
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding."),
    "transformer": ("transformer_blocks.", "single_transformer_blocks."),
    "text_encoder": ("text_model.", "text_projection"),
}


def checked_component(name: str) -> str:
    """A component's name, if it is one; empty for none.

    Raises:
        SpecError: it is not.
    """
    if name and name not in COMPONENTS:
        raise SpecError(f"no component {name!r}{nearest(name, COMPONENTS)}", hint=f"one of {', '.join(COMPONENTS)}")
    return name


def split(key: str) -> tuple[str, str]:
    """A component and what comes after it; the component is empty where a key begins with none."""
    first, _, rest = key.partition(".")
    return (first, rest) if first in COMPONENTS else ("", key)


def component_of(paths: Iterable[str]) -> str:
    """The component that layers belong to, by how their paths begin; empty where that does not tell."""
    listed = list(paths)
    for name, beginnings in _BEGINNINGS.items():
        if listed and all(path.startswith(beginnings) for path in listed):
            return name
    return ""


def the_one(path: Path, found: Mapping[str, Mapping[str, Any]], asked: str) -> str:
    """Which component's layers are to be read, of those that a file has.

    Raises:
        AdapterFileError: there are several and none was asked for, or there is none of that name.
    """
    told = ", ".join(f"{name or 'no component'} ({len(layers)} layers)" for name, layers in sorted(found.items()))
    if not asked and len(found) == 1:
        return next(iter(found))
    if asked in found:
        return asked
    if set(found) == {""}:
        return ""
    raise AdapterFileError(
        f"{path}: has layers of {told}" + (f", none of {asked}" if asked else "; a folder is for one model"),
        hint=f"take them one by one: --component {next(name for name in sorted(found) if name)}",
    )


def told_component(paths: Iterable[str], known: str, asked: str, what: str) -> str:
    """The component that an adapter is written for.

    Raises:
        AdapterFileError: nobody has said, and its paths do not tell.
    """
    listed = list(paths)
    component = asked or known or component_of(listed)
    if not component:
        raise AdapterFileError(
            f"{what} names the model of a pipeline, and {listed[0] if listed else 'nothing'} does not tell which",
            hint=f"--component, one of {', '.join(COMPONENTS)}",
        )
    return component
