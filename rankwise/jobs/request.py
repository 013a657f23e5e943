"""What `rankwise train` is asked for.  Every default has its reason, which is printed and kept in the report."""

from __future__ import annotations

import shlex
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rankwise.adapters.presets import SCENARIOS
from rankwise.adapters.scaling import Scaling
from rankwise.adapters.spec import (
    DATA_STARTS,
    ZERO_STARTS,
    AlphaPattern,
    Blocks,
    Form,
    Init,
    LoraSpec,
    RankPattern,
    named_targets,
    readable_exclusions,
    readable_targets,
)
from rankwise.engine.run import Loop, Pruning, Run, Start
from rankwise.errors import SpecError
from rankwise.formats.record import WHOLE
from rankwise.jobs.defaults import by_itself
from rankwise.kernels.sizes import Storage
from rankwise.settings import Settings
from rankwise.tasks import TaskName


def _default(value: Any, reason: str, **limits: Any) -> Any:
    return Field(default=value, description=reason, **limits)


# ── settings as they are written, on the command line, in a file or in Python ────────────────────────────────────────


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _by_commas(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _targets(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """As `named_targets`, but a regular expression keeps its `re:`: a command or a file must say it again."""
    found = readable_targets(named_targets(value))
    return value if isinstance(value, str) and value.startswith("re:") else found


def _exclusions(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    found = readable_exclusions(named_targets(value))
    return value if isinstance(value, str) and value.startswith("re:") else found


def _whole_tokens(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Texts of tokens that a command line can say, too."""
    bad = [text for text in texts if not text.strip() or text != text.strip() or "," in text]
    if bad or len(set(texts)) != len(texts):
        raise ValueError("expected texts of tokens, each once, without commas in them or spaces around them")
    return texts


def _at_home(value: Any) -> Any:
    """`~` as the home folder: a file or an option written `--data=~/x` never met a shell that would say so."""
    if isinstance(value, tuple):
        return tuple(_at_home(one) for one in value)
    if isinstance(value, Path):
        return value.expanduser()
    return expanduser(value) if isinstance(value, str) else value


def _file_and_share(value: str | None) -> str | None:
    """`FILE:SHARE`, whose share is a number."""
    if value is not None:
        source, _, share = value.rpartition(":")
        try:
            good = bool(source) and 0 < float(share) < 1
        except ValueError:
            good = False
        if not good:
            raise ValueError("expected FILE:SHARE with a share between 0 and 1, such as old.jsonl:0.2")
    return value


Place = Annotated[str | None, AfterValidator(_at_home)]
Repeated = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Names = Annotated[tuple[str, ...], BeforeValidator(_by_commas)]
NewTokens = Annotated[Names, AfterValidator(_whole_tokens)]

_OF_SCENARIO = ("rank", "alpha", "targets")
_OF_SPEC = ("rank", "layers", "form", "scaling", "dropout", "init", "rank_pattern", "alpha_pattern", "modules_to_save")
_OF_PRUNING = {"target_rank", "orthogonality"}
_OF_START = {"init_documents": DATA_STARTS, "init_rho": ("eva",)}  # which starts read it
_WITH_NEW_TOKENS: tuple[TaskName, ...] = ("causal-lm", "seq2seq")
# What an adapter that is trained further brings along.
_OF_ADAPTER = {"scenario", "alpha", "targets", "exclude", "add_tokens", *_OF_SPEC, *_OF_START}
# What nothing is read of where all weights are trained.
_FURTHER = {"continue_from", "keep_optimiser", "onto", "force"}
_OF_ADAPTERS_ALONE = (_OF_ADAPTER | _OF_PRUNING | _FURTHER | {"lr_ratio", "nested"}) - {"form"}


class TrainRequest(Settings):
    """A training run, whole.  Fields are the long options of `rankwise train` with '_' for '-', and the keys of a
    `--config` file; what a field means is said in `rankwise train --help`.

    Raises:
        SpecError: lists every unknown name and impossible value.
    """

    model: str
    data: Annotated[Repeated, AfterValidator(_at_home)] = Field(min_length=1)
    out: Annotated[Path, AfterValidator(_at_home)]
    task: TaskName = _default("causal-lm", "the model learns to go on with a text, or to answer")
    valid: Place = _default(None, "documents are held back")
    hold_back: float | None = _default(None, "a twentieth of the documents, at most 500", gt=0, lt=1)
    test: Place = _default(None, "the comparison with the base is made on the validation documents")
    continue_from: Annotated[Path | None, AfterValidator(_at_home)] = _default(None, "a fresh adapter")
    keep_optimiser: bool = _default(False, "its averages are of other documents, and young again after a warm-up")
    onto: Annotated[Path | None, AfterValidator(_at_home)] = _default(None, "on the bare base")
    replay: Annotated[Place, AfterValidator(_file_and_share)] = _default(None, "no old documents are mixed in")
    resume: bool = _default(False, "a new run")
    force: bool = _default(False, "an adapter of another base or chat template is refused")

    scenario: Literal["quick", "general", "complex", "limited"] | None = _default(None, "the defaults below")
    rank: int = _default(16, "the guides' default for one task", ge=1)
    alpha: float | None = _default(None, "twice the rank, the guides' rule", gt=0)
    targets: Annotated[str | tuple[str, ...], AfterValidator(_targets)] = _default(
        "all-linear", "best quality in the guides; the q/v presets need less"
    )
    exclude: Annotated[str | tuple[str, ...], AfterValidator(_exclusions)] = _default((), "no layer is left out")
    layers: Blocks = _default("", "every block")
    form: Form | Literal["full"] = _default(
        "lora", "LoRA; dora adds magnitudes, adalora moves ranks to where they matter, full trains all weights"
    )
    scaling: Scaling = _default("alpha/r", "the original; alpha/sqrt(r) is rsLoRA's, for high ranks")
    dropout: float = _default(0.0, "data are seen about once; 0.05 to 0.1 helps when they are seen often", ge=0, lt=1)
    init: Init = _default("kaiming", "as loralib and PEFT; the others begin with directions of the weight or the data")
    init_documents: int = _default(128, "as LoRA-GA's authors; eva looks at fewer where it is sure sooner", ge=1)
    init_rho: float = _default(2.0, "as EVA's authors: a layer may come to twice its rank, under the same total", ge=1)
    rank_pattern: RankPattern = _default({}, "one rank everywhere")
    alpha_pattern: AlphaPattern = _default({}, "one alpha everywhere")
    target_rank: int | None = _default(None, "of form adalora: two thirds of the rank at the start", ge=1)
    orthogonality: float = _default(0.1, "of form adalora: as its paper", ge=0)
    modules_to_save: Names = _default((), "nothing is trained whole")
    add_tokens: NewTokens = _default((), "the tokenizer stays as it is")

    nested: bool = _default(False, "one rank; nested learns the smaller ones along, each not quite as well as alone")

    lr: float = _default(2e-4, "inside the guides' range for LoRA, 1e-4 to 5e-4", gt=0)
    lr_ratio: float = _default(1.0, "one rate for A and B; LoRA+ takes 2 to 16", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = _default("linear", "falls to 0, so that the end is settled")
    warmup: float = _default(0.03, "AdamW's averages are young in the first steps", ge=0, lt=1)
    weight_decay: float = _default(0.0, "B starts at 0 and is small; decay matters over many epochs", ge=0)
    clip: float = _default(1.0, "one strange batch must not undo many good ones", gt=0)
    epochs: float = _default(1.0, "each document once; more while the validation loss still falls", gt=0)
    max_steps: int = _default(0, "as many steps as the epochs take", ge=0)
    batch_tokens: int = _default(4096, "8 to 40 usual documents a step; LoRA prefers small batches", ge=1)
    batch_documents: int | None = _default(None, "steps are counted in tokens", ge=1)
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
    storage: Storage = _default("dense", "weights as they are; nf4 (QLoRA) or int8 where memory is short")
    device: str = _default("auto", "a GPU when there is one")
    track: Repeated = _default((), "metrics.jsonl holds everything")

    @model_validator(mode="before")
    @classmethod
    def _on_task(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The settings of a task and of full training stand under those that were given."""
        task, form = (str(values.get(name, cls.model_fields[name].default)) for name in ("task", "form"))
        stands = {name: value for name, (value, _) in by_itself(task, form).items()}
        if values.get("batch_tokens") is not None:
            stands.pop("batch_documents", None)  # steps are counted one way
        return stands | values

    @model_validator(mode="before")
    @classmethod
    def _on_scenario(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The settings of a scenario stand under those that were given."""
        chosen = SCENARIOS.get(str(values.get("scenario")))
        if chosen is None:
            return values
        stands = {name: getattr(chosen, name) for name in _OF_SCENARIO}
        if str(values.get("rank", chosen.rank)) != str(chosen.rank):
            del stands["alpha"]  # it is twice the scenario's rank, and means nothing beside another
        return stands | values

    @model_validator(mode="after")
    def _makes_sense_whole(self) -> TrainRequest:
        if not self.whole:
            return self
        clash = sorted(_OF_ADAPTERS_ALONE & self.model_fields_set)
        if clash:
            raise ValueError(f"form full trains the model itself, without an adapter; leave out {', '.join(clash)}")
        if self.storage != "dense":
            raise ValueError(f"form full trains the weights, and storage {self.storage} holds codes; leave out storage")
        return self

    @model_validator(mode="after")
    def _makes_sense_nested(self) -> TrainRequest:
        if self.nested and (self.form != "lora" or self.init not in ZERO_STARTS):
            raise ValueError(f"nested ranks take form lora and init {', '.join(ZERO_STARTS)}")
        return self

    @model_validator(mode="after")
    def _makes_sense(self) -> TrainRequest:
        clash = sorted(_OF_ADAPTER & self.model_fields_set)
        if self.continue_from is not None and clash:
            raise ValueError(f"continue_from takes the adapter as it is; leave out {', '.join(clash)}")
        if self.keep_optimiser and self.continue_from is None:
            raise ValueError("keep_optimiser goes on with the optimiser of a run: say of which with continue_from")
        if self.onto is not None:
            self._check_onto()
        if self.replay is not None and (self.task == "image-classification" or self.replayed[0] in self.data):
            raise ValueError("replay mixes in rows of text of another file than those of data")
        if self.batch_documents is not None and "batch_tokens" in self.model_fields_set:
            raise ValueError("a step is counted in batch_tokens or in batch_documents, not in both")
        if self.valid is not None and self.hold_back is not None:
            raise ValueError("hold_back sets documents aside where there is no valid; leave one of them out")
        astray = sorted(_OF_PRUNING & self.model_fields_set)
        if self.form != "adalora" and astray:
            raise ValueError(f"{', '.join(astray)}: of form adalora alone, and the form is {self.form}")
        if self.init == "loftq" and self.storage == "dense":
            raise ValueError("init loftq begins with what rounding took away: it needs storage int8 or nf4")
        unread = sorted(n for n, starts in _OF_START.items() if n in self.model_fields_set and self.init not in starts)
        if unread:
            raise ValueError(f"init {self.init} does not read {', '.join(unread)}; leave it out, or take another init")
        if self.init == "eva" and self.rank_pattern and self.init_rho > 1:
            raise ValueError("init eva gives out the ranks itself; leave out rank_pattern, or say init_rho 1")
        if self.init in DATA_STARTS and self.task != "causal-lm":
            raise ValueError(f"init {self.init} looks at documents as task causal-lm reads them; take another init")
        if self.add_tokens and self.task not in _WITH_NEW_TOKENS:
            raise ValueError(f"add_tokens are for what a model says, which task {self.task} does not teach")
        return self

    def _check_onto(self) -> None:
        """What stands on another adapter is added to it in the end, on the bare base."""
        apart = [name for name in ("continue_from", "modules_to_save", "add_tokens", "nested") if getattr(self, name)]
        if apart:
            raise ValueError(f"onto trains a fresh adapter on top of one; leave out {', '.join(apart)}")
        if self.form == "dora":
            raise ValueError("onto adds up two changes of W, and what form dora makes of W is no sum; take form lora")
        if self.storage != "dense":
            raise ValueError(f"onto merges an adapter beneath, and storage {self.storage} holds codes; leave out one")

    @property
    def replayed(self) -> tuple[str, float]:
        """The file that is mixed in, and its share of the documents; ("", 0) where there is none."""
        source, _, share = (self.replay or ":0").rpartition(":")
        return source, float(share)

    @property
    def whole(self) -> bool:
        """Whether all weights are trained, and no adapter."""
        return self.form == WHOLE

    @property
    def spec(self) -> LoraSpec:
        return self.spec_with(())

    def spec_with(self, fresh: tuple[str, ...]) -> LoraSpec:
        """The adapter; `fresh` modules of the model are trained whole beside those asked for."""
        values = {name: getattr(self, name) for name in _OF_SPEC}
        values["modules_to_save"] = tuple(dict.fromkeys([*self.modules_to_save, *fresh]))
        named = {name: named_targets(getattr(self, name)) for name in ("targets", "exclude")}
        return LoraSpec(alpha=self._alpha, **named, **values)

    @property
    def run(self) -> Run:
        same = set(Run.model_fields) & set(type(self).model_fields)
        pruning = Pruning(target_rank=self.target_rank, orthogonality=self.orthogonality)
        moments = self.continue_from if self.keep_optimiser else None
        return Run(**{name: getattr(self, name) for name in same}, pruning=pruning, moments=moments)

    @property
    def loop(self) -> Loop:
        same = set(Loop.model_fields) & set(type(self).model_fields) - {"replay"}  # which documents is found out later
        return Loop(**{name: getattr(self, name) for name in same})

    @property
    def start(self) -> Start:
        return Start(
            documents=self.init_documents,
            rho=self.init_rho,
            micro_tokens=self.micro_tokens,
            checkpointing=self.checkpointing,
        )

    @property
    def _alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2 * self.rank

    def table(self) -> list[dict[str, Any]]:
        """Every setting that is read, with its reason, for people: `name`, `value`, `reason`."""
        left_out = _OF_ADAPTERS_ALONE if self.whole else ()
        return [self._row(name) for name in type(self).model_fields if name not in left_out]

    def _row(self, name: str) -> dict[str, Any]:
        value = self._alpha if name == "alpha" else getattr(self, name)
        scenario = SCENARIOS[self.scenario] if self.scenario and name in _OF_SCENARIO else None
        reason = "asked for" if name in self.model_fields_set else type(self).model_fields[name].description
        if self.continue_from is not None and name in _OF_ADAPTER:
            value, reason = None, "as in the adapter that is trained further"
        elif scenario is not None and value == getattr(scenario, name):
            reason = f"{self.scenario}: {scenario.reason}"
        elif self._is_of_task(name):
            reason = by_itself(self.task, self.form)[name][1]
        return {"name": name, "value": _plain(value), "reason": reason}

    def _is_of_task(self, name: str) -> bool:
        """Whether a setting is as its task, or full training, has it by itself."""
        own = by_itself(self.task, self.form)
        return name in own and getattr(self, name) == own[name][0]

    def command(self) -> str:
        """The command that asks for the same."""
        words = ["rankwise train"]
        for name in type(self).model_fields:
            value = getattr(self, name)
            silent = name not in self.model_fields_set or name == "resume" or self._is_of_task(name)
            if silent or value is None or value is False:
                continue
            option = "--" + name.replace("_", "-")
            words += [option] if value is True else [f"{option} {shlex.quote(one)}" for one in _written(name, value)]
        return " ".join(words)


def _written(name: str, value: Any) -> list[str]:
    """A setting as its option takes it, once or several times."""
    if isinstance(value, dict):
        return [f"{pattern}={number}" for pattern, number in value.items()]
    if isinstance(value, tuple):
        return list(value) if name in ("data", "track") else [",".join(value)]
    return [str(value)]


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
    return {str(name).replace("-", "_"): value for name, value in found.items()}
