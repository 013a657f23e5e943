"""What `rankwise train` is asked for.  Every default has its reason, which is printed and kept in the report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rankwise.adapters.presets import SCENARIOS, TARGET_ROLES
from rankwise.adapters.scaling import Scaling
from rankwise.adapters.spec import AlphaPattern, LoraSpec, RankPattern, readable_targets
from rankwise.errors import SpecError
from rankwise.settings import Settings


def _default(value: Any, reason: str, **limits: Any) -> Any:
    return Field(default=value, description=reason, **limits)


# ── settings as they are written: on the command line, in a config file, in Python ───────────────────────────────────


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _by_commas(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    """`PATTERN=NUMBER`, once or several times, or a mapping; a pattern may hold a '=' itself."""
    if isinstance(value, Mapping):
        return value
    pairs = [str(one).rpartition("=") for one in _one_or_many(value)]
    if not all(pattern for pattern, _, _ in pairs):
        raise ValueError("expected PATTERN=NUMBER")
    return {pattern: number for pattern, _, number in pairs}


def _targets(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """A preset, names (with commas between or as a list), or a regular expression after 're:', which it keeps."""
    if isinstance(value, str) and value not in TARGET_ROLES and not value.startswith("re:"):
        value = _by_commas(value)
    readable_targets(_of_spec(value))
    return value


def _of_spec(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return targets.removeprefix("re:") if isinstance(targets, str) else targets


Repeated = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Names = Annotated[tuple[str, ...], BeforeValidator(_by_commas)]

# What an adapter that is trained further brings along.
_ADAPTERS_OWN = (
    "scenario rank alpha targets scaling dropout init rank_pattern alpha_pattern modules_to_save"  # as one can read it
).split()


class TrainRequest(Settings):
    """A training run, whole.  Fields are the long options of `rankwise train` with '_' for '-', and the keys of a
    `--config` file; what a field means is said in `rankwise train --help`.

    Raises:
        SpecError: lists every unknown name and impossible value.
    """

    model: str
    data: Repeated = Field(min_length=1)
    out: Path
    valid: str | None = _default(None, "a twentieth of the documents, at most 500, is set aside")
    test: str | None = _default(None, "the comparison with the base is made on the validation documents")
    continue_from: Path | None = _default(None, "a fresh adapter")
    resume: bool = _default(False, "a new run")

    scenario: Literal["quick", "general", "complex", "limited"] | None = _default(None, "the defaults below")
    rank: int = _default(16, "the guides' default for one task", ge=1)
    alpha: float | None = _default(None, "twice the rank, the guides' rule", gt=0)
    targets: Annotated[str | tuple[str, ...], AfterValidator(_targets)] = _default(
        "all-linear", "best quality in the guides; the q/v presets need less"
    )
    scaling: Scaling = _default("alpha/r", "the original; alpha/sqrt(r) is rsLoRA's, for high ranks")
    dropout: float = _default(0.0, "data are seen about once; 0.05 to 0.1 helps when they are seen often", ge=0, lt=1)
    init: Literal["kaiming", "gaussian"] = _default("kaiming", "as loralib and PEFT")
    rank_pattern: Annotated[RankPattern, BeforeValidator(_pairs)] = _default({}, "one rank everywhere")
    alpha_pattern: Annotated[AlphaPattern, BeforeValidator(_pairs)] = _default({}, "one alpha everywhere")
    modules_to_save: Names = _default((), "nothing is trained whole")

    lr: float = _default(2e-4, "inside the guides' range for LoRA, 1e-4 to 5e-4", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = _default("linear", "falls to 0, so that the end is settled")
    warmup: float = _default(0.03, "AdamW's averages are young in the first steps", ge=0, lt=1)
    weight_decay: float = _default(0.0, "B starts at 0 and is small; decay matters over many epochs", ge=0)
    clip: float = _default(1.0, "one strange batch must not undo many good ones", gt=0)
    epochs: float = _default(1.0, "each document once; more while the validation loss still falls", gt=0)
    max_steps: int = _default(0, "as many steps as the epochs take", ge=0)
    batch_tokens: int = _default(4096, "8 to 40 usual documents a step; LoRA prefers small batches", ge=1)
    micro_tokens: int = _default(0, "by device: the smallest size at which its products are fast", ge=0)
    max_length: int = _default(2048, "longer documents are cut, and counted", ge=8)
    overlong: Literal["truncate", "drop"] = _default("truncate", "the beginning of a long document still teaches")
    train_on: Literal["all", "last"] = _default("all", "every assistant turn is an example")
    seed: int = _default(0, "same seed, same bits on a CPU", ge=0)
    patience: int = _default(0, "the best validation loss is kept anyway; 0 trains to the end", ge=0)
    evaluate_every: int = _default(0, "about ten evaluations a run", ge=0)
    save_every: int = _default(0, "a checkpoint at every evaluation", ge=0)
    checkpointing: bool = _default(False, "a third more time; switch on when memory is short")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _default("auto", "what this machine multiplies fast")
    device: str = _default("auto", "a GPU when there is one")
    track: Repeated = _default((), "metrics.jsonl holds everything")

    @model_validator(mode="before")
    @classmethod
    def _of_scenario(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A scenario's settings stand under those that were given."""
        chosen = SCENARIOS.get(str(values.get("scenario")))
        return {name: getattr(chosen, name) for name in _SCENARIOS_OWN} | values if chosen else values

    @model_validator(mode="after")
    def _makes_sense(self) -> TrainRequest:
        clash = [name for name in _ADAPTERS_OWN if name in self.model_fields_set]
        if self.continue_from is not None and clash:
            raise ValueError(f"continue_from takes the adapter as it is; leave out {', '.join(clash)}")
        return self

    @property
    def spec(self) -> LoraSpec:
        names = ("rank", "scaling", "dropout", "init", "rank_pattern", "alpha_pattern", "modules_to_save")
        values = {name: getattr(self, name) for name in names}
        alpha = self.alpha if self.alpha is not None else 2 * self.rank
        return LoraSpec(alpha=alpha, targets=_of_spec(self.targets), **values)

    def table(self) -> list[dict[str, Any]]:
        """Every setting with its reason, for people: `name`, `value`, `reason`."""
        return [dict(zip(("name", "value", "reason"), (name, *self._explained(name)), strict=True)) for name in FIELDS]

    def command(self) -> str:
        """The command that asks for the same."""
        words = ["rankwise train"]
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name not in self.model_fields_set or name == "resume" or value is None or value is False:
                continue
            option = "--" + name.replace("_", "-")
            words += [option] if value is True else [f"{option} {shlex.quote(one)}" for one in _written(name, value)]
        return " ".join(words)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; names are checked with all the others.

    Raises:
        SpecError: it cannot be read, is not YAML, or holds no mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not YAML: {error}") from None
    if not isinstance(found, dict):
        raise SpecError(f"{path}: expected 'name: value' lines, found {type(found).__name__}")
    names = {str(name).replace("-", "_"): value for name, value in found.items()}
    if isinstance(names.get("data"), str):
        names["data"] = (names["data"],)
    return names
