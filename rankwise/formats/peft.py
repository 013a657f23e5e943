"""PEFT's adapter folder, both ways: adapter_config.json and adapter_model.safetensors (PEFT 0.18 to 0.21).

A config is data: known keys are read, keys that would change the result in a way rankwise does not know are errors,
keys that change nothing are ignored; nothing in it is ever imported or run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.lowrank import LowRank
from rankwise.adapters.scaling import Scaling, alpha_of
from rankwise.adapters.selection import is_within
from rankwise.adapters.spec import Form, LoraSpec, exactly
from rankwise.errors import AdapterFileError, listing
from rankwise.formats.record import nested_ranks
from rankwise.formats.tensors import read_tensors, write_tensors, write_text
from rankwise.formats.token_rows import KEY, said_tokens, take_rows, written_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FROZEN = (".token_adapter.base_layer.weight", ".base_layer.weight")  # a whole matrix, which PEFT may store along
_FACTOR = re.compile(
    r"(?P<path>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<lookup>[AB])|lora_(?P<magnitude>m)agnitude_vector"
    r"|lora_(?P<triplet>[ABE]))"
)

# Keys that change what the stored tensors mean, with the values under which they change nothing.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", "ADALORA"),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "layer_replication": (None,),
    "target_parameters": (None, [], {}),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "ensure_weight_tying": (None, False),
}
# Keys that are read here, or say only which layers were chosen, how training began, or who wrote the file.
# fmt: off
_KNOWN = _MUST_BE.keys() | {
    "r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern",
    "modules_to_save", KEY, "use_dora", "base_model_name_or_path", "revision", "task_type", "peft_version",
    "inference_mode", "fan_in_fan_out", "auto_mapping", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "megatron_config", "megatron_core", "runtime_config",
    # of ADALORA: how it was trained; its ranks are those of the tensors
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}
# fmt: on
# Starts that leave a changed base behind; every other value only says how the tensors once began.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def read_adapter(folder: Path) -> Adapter:
    """An adapter from a folder in PEFT's format.

    Raises:
        AdapterFileError: a file is missing or damaged, the config asks for what is not known, a tensor's name or rank
            does not agree with the config; all of it listed.
    """
    config = _read_config(folder / CONFIG)
    stored = read_tensors(folder / WEIGHTS)
    factors, rest = _sorted_out(stored)
    triplets = config["peft_type"] == "ADALORA"
    spec = _spec_without_triplets(config, factors) if triplets else _spec(config, tuple(factors))
    problems, sites = [], {}
    wanted = {"A", "B", "m"} if spec.form == "dora" else {"A", "B"}
    for path, pair in factors.items():
        if not wanted <= pair.keys():
            problems.append(f"{path}: has {', '.join(sorted(pair))} only, of {' and '.join(sorted(wanted))}")
        elif pair.keys() > wanted:
            more = "magnitudes, but use_dora is not set" if "m" in pair else "a diagonal, but peft_type is not ADALORA"
            problems.append(f"{path}: has {more} in the config")
        elif pair["A"].shape[0] != pair["B"].shape[1]:
            problems.append(f"{path}: A has rank {pair['A'].shape[0]}, B rank {pair['B'].shape[1]}")
        elif pair["A"].shape[0] != spec.rank_at(path):
            problems.append(f"{path}: rank {pair['A'].shape[0]} in the tensors, {spec.rank_at(path)} in the config")
        else:
            own = {part: tensor.float() for part, tensor in pair.items()}
            m = own["m"].reshape(-1) if "m" in own else None
            sites[path] = LowRank(own["A"], own["B"], spec.scale_at(path), spec.dropout, m=m)
    frozen = {key.removesuffix(end): rest.pop(key) for end in _FROZEN for key in list(rest) if key.endswith(end)}
    rows, astray = take_rows(rest, said_tokens(config))
    modules, strangers = _modules(rest, spec.modules_to_save)
    problems += astray
    problems += [f"{key}: neither a factor nor part of modules_to_save" for key in strangers]
    if problems:
        raise AdapterFileError(f"{folder}: {len(problems)} parts cannot be understood:\n{listing(problems)}")
    if not sites and not modules and not rows:
        raise AdapterFileError(f"{folder / WEIGHTS}: holds no tensor")
    return Adapter(spec, sites, modules, frozen, rows, nested_ranks(folder))


def token_ids(folder: Path) -> list[int]:
    """The tokens of which an adapter has rows, by its config alone.

    Raises:
        AdapterFileError: there is none, or it asks for what is not known.
    """
    return _tokens(_read_config(folder / CONFIG))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise AdapterFileError(f"{path}: no such file", hint=f"an adapter folder holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path}: expected an object, found {type(config).__name__}")
    problems = [
        f"{key} = {config[key]!r}: only {' or '.join(map(repr, allowed))} can be read"
        for key, allowed in _MUST_BE.items()
        if key in config and config[key] not in allowed
    ]
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        problems.append(
            f"init_lora_weights = {init!r}: the tensors belong to a base changed at the start, not to the original; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    try:
        said_tokens(config)
    except ValueError as error:
        problems.append(str(error))
    problems += [f"{key} = {config[key]!r}: not known here" for key in config if key not in _KNOWN and config[key]]
    if problems:
        raise AdapterFileError(f"{path}: {len(problems)} settings cannot be honoured:\n{listing(problems)}")
    return config


def stated_task(folder: Path) -> str | None:
    """PEFT's name for what an adapter is for, where its config says.

    Raises:
        AdapterFileError: the config is missing or damaged.
    """
    task = _read_config(folder / CONFIG).get("task_type")
    return None if task is None else str(task)


def stated_form(folder: Path) -> Form:
    """The form of an adapter by its config alone.

    Raises:
        AdapterFileError: the config is missing or damaged.
    """
    return _form(_read_config(folder / CONFIG))


def _form(config: Mapping[str, Any]) -> Form:
    return "dora" if config.get("use_dora") else "lora"


def _spec(config: Mapping[str, Any], paths: tuple[str, ...]) -> LoraSpec:
    """`paths` are those that there are tensors for."""
    return LoraSpec(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        **_choice(config, paths),
        form=_form(config),
        scaling="alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
        dropout=config.get("lora_dropout") or 0.0,
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        trained_tokens=tuple(_tokens(config)),
    )


def _spec_without_triplets(config: Mapping[str, Any], factors: dict[str, dict[str, Tensor]]) -> LoraSpec:
    """Of AdaLoRA's tensors, once the diagonal E has been taken into A and sites without rank have been left out.

    What is left is a plain adapter whose scale is the same everywhere, whatever its ranks have become: PEFT divides by
    the rank at the start.
    """
    for path in [path for path, found in factors.items() if found.keys() == {"A", "B", "E"}]:
        found = factors[path]
        found["A"] = found["A"] * found.pop("E").view(-1, 1)
        if not len(found["A"]):
            del factors[path]
    ranks = {exactly(path): len(found["A"]) for path, found in factors.items() if "A" in found}
    like = {name: value for name, value in config.items() if name not in ("r", "rank_pattern", "alpha_pattern")}
    spec = _spec(like | {"r": max(ranks.values(), default=1), "rank_pattern": ranks}, tuple(factors))
    values = spec.model_dump() | {"scaling": "alpha", "alpha": spec.alpha / (config["init_r"] + 1e-5)}
    return LoraSpec(**values)


def _tokens(config: Mapping[str, Any]) -> list[int]:
    return sorted({token for ids in said_tokens(config).values() for token in ids})


def _choice(config: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    """Which layers the config says were chosen, where that can be said here; else those that were."""
    named = {name: config.get(f"{name}_modules") or () for name in ("target", "exclude")}
    targets, exclude = (n if isinstance(n, str) else tuple(sorted(n)) for n in named.values())
    layers = config.get("layers_to_transform")
    found: dict[str, Any] = {"targets": targets or ".*", "exclude": exclude, "layers": "" if layers is None else layers}
    # A pattern picks one stack of several.  And PEFT overlooks blocks that nothing stands above but their stack.
    said = LoraSpec(**found)
    strays = [path for path in paths if not is_within(said, path)]
    return {"targets": paths} if strays or (said.layers and paths and config.get("layers_pattern")) else found


def _sorted_out(stored: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Factors by site path, and the tensors that are none."""
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = key.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(name)
        if match:
            part = match["linear"] or match["lookup"] or match["magnitude"] or match["triplet"]
            factors.setdefault(match["path"], {})[part] = tensor
        else:
            rest[name] = tensor
    return factors, rest


def _modules(rest: Mapping[str, Tensor], names: tuple[str, ...]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors of modules trained whole by module path, and the keys that belong to none."""
    modules: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in rest.items():
        path = next((p for p in _ancestors(key) if any(p == n or p.endswith(f".{n}") for n in names)), None)
        if path is None:
            strangers.append(key)
        else:
            modules.setdefault(path, {})[key.removeprefix(f"{path}.")] = tensor.float()
    return modules, strangers


def _ancestors(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def write_adapter(
    folder: Path, adapter: Adapter, kinds: Mapping[str, str], modules: tuple[str, ...], base: str, task: str | None
) -> None:
    """Writes a folder that PEFT, vLLM and the rest of the ecosystem read.

    Args:
        folder: made if need be; the config is written last.
        adapter: what to write.
        kinds: the kind of each site (`surgery/kinds.py`), for the names of its tensors.
        modules: every module path of the model, to say shortly which are targeted.
        base: name or path of the base model.
        task: PEFT's task type, or None.
    """
    tensors: dict[str, Tensor] = {}
    for path, factors in adapter.sites.items():
        stem = f"{_PREFIX}{path}.lora_" + ("embedding_{}" if kinds[path] == "embedding" else "{}.weight")
        tensors[stem.format("A")], tensors[stem.format("B")] = factors.A, factors.B
        if factors.m is not None:  # PEFT keeps a convolution's magnitudes in the shape of its output
            own = factors.m.view(1, -1, *(1 for _ in factors.shape.kernel)) if factors.shape.kernel else factors.m
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = own
    for path, parameters in adapter.modules.items():
        tensors.update({f"{_PREFIX}{path}.{name}": tensor for name, tensor in parameters.items()})
    rows, said = written_rows(adapter.tokens)
    tensors.update({_PREFIX + name: tensor for name, tensor in rows.items()})
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    config = _config(adapter, modules) | {
        "base_model_name_or_path": base,
        "fan_in_fan_out": "conv1d-linear" in kinds.values(),
        "task_type": task,
        KEY: said,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _config(adapter: Adapter, modules: tuple[str, ...]) -> dict[str, Any]:
    """Ranks come from the tensors and alphas from the scales: PEFT must arrive at exactly these."""
    spec = adapter.spec
    rule: Scaling = "alpha/sqrt(r)" if spec.scaling == "alpha/sqrt(r)" else "alpha/r"
    ranks = {path: factors.rank for path, factors in adapter.sites.items()}
    alphas = {path: alpha_of(rule, factors.scale, factors.rank) for path, factors in adapter.sites.items()}
    rank, alpha = _commonest(ranks, spec.rank), float(_commonest(alphas, spec.alpha))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {exactly(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(p): _plain(a) for p, a in alphas.items() if a != alpha},
        "target_modules": _targets(tuple(adapter.sites), modules),
        "modules_to_save": list(adapter.modules) or None,
        "lora_dropout": spec.dropout,
        "use_rslora": rule == "alpha/sqrt(r)",
        "use_dora": spec.form == "dora",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }


def task_of(model: Any) -> str | None:
    """PEFT's name for what the model does, from its class."""
    paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # others read pictures, and continue
    conditional = "SEQ_2_SEQ_LM" if paired else "CAUSAL_LM"
    ends = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": conditional}
    ends |= {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for end, task in ends.items() if type(model).__name__.endswith(end)), None)


def _commonest(values: Mapping[str, Any], otherwise: Any) -> Any:
    return max(set(values.values()), key=list(values.values()).count) if values else otherwise


def _plain(alpha: float) -> float | int:
    """A whole number is written as one."""
    return int(alpha) if alpha.is_integer() else alpha


def _targets(paths: tuple[str, ...], modules: tuple[str, ...]) -> list[str]:
    """The last parts of the paths where they mean these sites and no other module; else the whole paths."""
    leaves = {path.rsplit(".", 1)[-1] for path in paths}
    meant = {m for m in modules if m.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves if meant == set(paths) else paths)
