"""mlx-lm's adapter folder: adapter_config.json and adapters.safetensors, read and written.

Format: github.com/ml-explore/mlx-lm, tuner/lora.py, tuner/dora.py and tuner/utils.py.  Factors are stored transposed,
`lora_a` `[I, R]` and `lora_b` `[R, O]`.  A folder has one rank and one scale, which is the factor s itself: smaller
ranks are filled up with zeros, and what a layer's factor differs by goes into B.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank
from rankwise.errors import AdapterFileError, listing
from rankwise.formats.portable import Portable, Terms, folded, from_factors, obstacles, paired, refuse
from rankwise.formats.tensors import read_tensors, write_tensors, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_ENDS = {"lora_a": "A", "lora_b": "B", "m": "m"}
_FORMS = ("lora", "dora")


def read_adapter(folder: Path, terms: Terms) -> Portable:
    """An adapter from mlx-lm's folder.

    Raises:
        AdapterFileError: a file is missing or damaged, it is a model that was trained whole, or tensors belong to no
            layer; all of them.
    """
    config = _read_config(folder / CONFIG)
    found: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in read_tensors(folder / WEIGHTS).items():
        path, _, end = key.rpartition(".")
        if end not in _ENDS or tensor.dim() > 2:
            strangers.append(f"{key} {tuple(tensor.shape)}")
        else:
            found.setdefault(path, {})[_ENDS[end]] = tensor.t().contiguous() if end != "m" else tensor
    if strangers:
        raise AdapterFileError(f"{folder}: {len(strangers)} tensors are no factors of a layer:\n{listing(strangers)}")
    scale = float(config["lora_parameters"]["scale"])
    sites = paired(folder / WEIGHTS, found, dict.fromkeys(found, scale))
    if terms.outline is None:  # its own names of embeddings
        lookups = frozenset(path for path in sites if path.endswith("embed_tokens"))
        return Portable(from_factors(sites), lookups=lookups, base=str(config.get("model") or ""))
    return Portable(from_factors(sites)).known_on(terms.outline)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        form, scale = config.get("fine_tune_type", "lora"), float(config["lora_parameters"]["scale"])
    except (
        OSError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise AdapterFileError(
            f"{path}: not a config of mlx-lm: {error!r}", hint="it says fine_tune_type and lora_parameters with a scale"
        ) from None
    if form not in _FORMS or not scale > 0:
        raise AdapterFileError(
            f"{path}: fine_tune_type {form!r}, scale {scale}: expected {' or '.join(_FORMS)}, above 0"
        )
    return dict(config)


def write_adapter(folder: Path, portable: Portable, terms: Terms) -> None:
    """Writes what `mlx_lm.generate --adapter-path` takes.

    Raises:
        AdapterFileError: lists everything that the format cannot hold.
    """
    sites = portable.adapter.sites
    problems = obstacles(portable, dora=True, convolutions=False, lookups=True)
    for path, factors in sites.items():
        if not _named_alike(path):
            problems.append(f"{path}: mlx-lm calls the layers of this family otherwise")
        elif factors.m is not None and path in portable.lookups:
            problems.append(f"{path}: an embedding of form dora, whose magnitudes mlx-lm counts by word")
        elif terms.outline is not None and terms.outline.tied and path == "lm_head":
            problems.append(f"{path}: the head is the embedding, which mlx-lm has no second layer for")
    refuse("mlx-lm's format", problems)
    rank = max(factors.rank for factors in sites.values())
    scale = Counter(factors.scale for factors in sites.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for path, factors in sites.items():
        own = _filled_up(folded(factors, scale), rank)
        tensors |= {f"{path}.lora_a": own.A.detach().t(), f"{path}.lora_b": own.B.detach().t()}
        if own.m is not None:
            tensors[f"{path}.m"] = own.m.detach()
    write_tensors(folder / WEIGHTS, {name: tensor.to(terms.dtype) for name, tensor in tensors.items()})
    config = {
        "fine_tune_type": "dora" if any(factors.m is not None for factors in sites.values()) else "lora",
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted({*map(_key, sites)})},
        "num_layers": -1,  # of all blocks; those without tensors keep B at zero
        **({"model": portable.base} if portable.base else {}),
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _named_alike(path: str) -> bool:
    """Whether mlx-lm has the layer under the name that transformers gives it: families laid out like Llama."""
    return path in ("lm_head", "model.embed_tokens") or path.startswith("model.layers.")


def _key(path: str) -> str:
    """How the config names a layer: within its block, or whole where it is in none."""
    return path.split(".", 3)[3] if path.startswith("model.layers.") else path


def _filled_up(factors: LowRank, rank: int) -> LowRank:
    more = rank - factors.rank
    A = torch.nn.functional.pad(factors.A.detach(), (0, 0, 0, more))
    B = torch.nn.functional.pad(factors.B.detach(), (0, more))
    return LowRank(A, B, factors.scale, m=None if factors.m is None else factors.m.detach())
