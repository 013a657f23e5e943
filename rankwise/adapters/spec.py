"""What is asked for: the four axes, the sites, the start.  Torch-free.

axis      choices                                   the names people know
form      lora · dora · adalora                     LoRA · DoRA · AdaLoRA
scaling   alpha/r · alpha/sqrt(r) · alpha           LoRA · rsLoRA · direct
storage   of the base: frozen/coded.py              QLoRA: nf4 and any form
rates     of the run: engine/run.py                 LoRA+ (a ratio of 1 is AdamW)
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rankwise.adapters.blocks import read_blocks
from rankwise.adapters.presets import SCENARIOS, TARGET_ROLES
from rankwise.adapters.scaling import Scaling, effective_scale
from rankwise.errors import SpecError, nearest
from rankwise.settings import Settings


def _compile(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def named_targets(value: Any) -> Any:
    """Targets as a person writes them: a preset, names with commas between, or a regular expression after `re:`."""
    if not isinstance(value, str) or value in TARGET_ROLES:
        return value
    if value.startswith("re:"):
        return value.removeprefix("re:")
    return tuple(name.strip() for name in value.split(",") if name.strip())


def readable_targets(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """`targets` as they are, if they can be what a spec targets."""
    if not targets:
        raise ValueError("names no layer; use a preset such as 'all-linear' or a list of names")
    if isinstance(targets, str) and targets not in TARGET_ROLES:
        _compile(targets)
    return targets


def readable_exclusions(exclude: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """As `readable_targets`; none at all is fine too."""
    return exclude if exclude == () else readable_targets(exclude)


def _pairs(value: Any) -> Any:
    """`PATTERN=NUMBER`, once or several times, or a mapping."""
    if not isinstance(value, str | list | tuple):
        return value
    pairs = [str(one).rpartition("=") for one in ([value] if isinstance(value, str) else value)]
    if not all(pattern for pattern, _, _ in pairs):
        raise ValueError("expected PATTERN=NUMBER, such as q_proj=8")
    return {pattern: number for pattern, _, number in pairs}


def _readable_patterns(patterns: dict[str, Any]) -> dict[str, Any]:
    for key in patterns:
        _compile(key)
    return patterns


def _each_once(ids: tuple[int, ...]) -> tuple[int, ...]:
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise ValueError(f"{', '.join(map(str, twice))} more than once")
    return ids


Form = Literal["lora", "dora", "adalora"]
Init = Literal["kaiming", "gaussian", "pissa", "olora", "loftq", "eva", "lora_ga"]
DATA_STARTS = ("eva", "lora_ga")  # those that `rankwise.begin` finds in documents
ZERO_STARTS = ("kaiming", "gaussian", "eva")  # one of A and B is zero: any of the directions begin at the base
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0)]
Targets = Annotated[str | tuple[str, ...], AfterValidator(readable_targets)]
Exclusions = Annotated[str | tuple[str, ...], AfterValidator(readable_exclusions)]
Blocks = Annotated[str, BeforeValidator(read_blocks)]
RankPattern = Annotated[dict[str, Rank], BeforeValidator(_pairs), AfterValidator(_readable_patterns)]
AlphaPattern = Annotated[dict[str, Alpha], BeforeValidator(_pairs), AfterValidator(_readable_patterns)]


TokenIds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_each_once)]


class LoraSpec(Settings):
    """An adapter before it exists.

    Args:
        rank: rows of A and columns of B at every site that `rank_pattern` does not name; of form `adalora` before
            pruning (`Run.pruning`), by which alpha is divided to the end.
        alpha: numerator of the scale at every site that `alpha_pattern` does not name.
        targets: a preset (`minimal`, `attention`, `mlp`, `all-linear`), a list of layer names (whole paths or their
            last parts), or a regular expression that matches whole paths.
        exclude: layers that are left out of these; said as `targets`.
        layers: blocks, by number, outside which nothing is adapted but what `targets` name by a whole path
            (`adapters/blocks.py`): a number, several, or text such as `0-11,20` or `16-`; kept as text.
        form, scaling: two of the four axes; storage is the base's (`load_base`), rates are a run's (`Run.lr_ratio`).
        dropout: probability with which an input element of the adapter branch is zeroed in training.
        init: how A starts, with B at zero, so that training starts at the base (for embeddings A and B swap roles);
            or, `pissa` and `olora`, A and B out of the weight, with the start taken off again: the base stays as it is;
            or `loftq`: out of what holding the base in codes took away, so that training starts nearer to the dense;
            or, `eva` and `lora_ga`, out of what documents do in the model, which `rankwise.begin` finds.
        rank_pattern, alpha_pattern: pattern → value for single sites.  A pattern is a regular expression that matches
            the whole path or its last parts; the first match wins, as in PEFT.
        modules_to_save: layers trained whole, as copies, and stored with the adapter.
        new_tokens: ids of tokens that the tokenizer has anew.  The adapter has rows of its own for them, in the
            embedding and in a head that does not share its weight; they begin at the mean of the rows before them.
        trained_tokens: ids of tokens that were there, whose rows in the same places are trained further.

    Raises:
        SpecError: lists every unknown name and impossible value.
    """

    rank: Rank = 16
    alpha: Alpha = 32
    targets: Targets = "all-linear"
    exclude: Exclusions = ()
    layers: Blocks = ""
    form: Form = "lora"
    scaling: Scaling = "alpha/r"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init: Init = "kaiming"
    rank_pattern: RankPattern = Field(default_factory=dict)
    alpha_pattern: AlphaPattern = Field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    new_tokens: TokenIds = ()
    trained_tokens: TokenIds = ()

    @model_validator(mode="after")
    def _tells_tokens_apart(self) -> LoraSpec:
        both = sorted({*self.new_tokens} & {*self.trained_tokens})
        if both:
            raise ValueError(f"tokens {', '.join(map(str, both))} are in new_tokens and in trained_tokens")
        return self

    @model_validator(mode="after")
    def _combines(self) -> LoraSpec:
        if self.form == "adalora" and self.init == "eva":
            raise ValueError("form adalora and init eva both give the ranks out, and one of them is enough")
        if self.form == "adalora" and self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"form adalora begins with Λ at zero, which leaves nothing of init {self.init}")
        return self

    @classmethod
    def scenario(cls, name: str, **changes: Any) -> LoraSpec:
        """The starting point the guides give for a scenario: `quick`, `general`, `complex` or `limited`."""
        if name not in SCENARIOS:
            raise SpecError(
                f"no scenario {name!r}{nearest(name, list(SCENARIOS))}", hint=f"one of {', '.join(SCENARIOS)}"
            )
        chosen = SCENARIOS[name]
        return cls(**{"rank": chosen.rank, "alpha": chosen.alpha, "targets": chosen.targets, **changes})

    def rank_at(self, path: str) -> int:
        return self.rank_pattern.get(matching_pattern(self.rank_pattern, path) or "", self.rank)

    def alpha_at(self, path: str) -> float:
        return self.alpha_pattern.get(matching_pattern(self.alpha_pattern, path) or "", self.alpha)

    def scale_at(self, path: str) -> float:
        """The effective factor s in W + s·B·A at a site."""
        return effective_scale(self.scaling, self.alpha_at(path), self.rank_at(path))


def exactly(path: str) -> str:
    """A pattern for one site: any parents may stand before a pattern, which `^` keeps out."""
    return f"^{re.escape(path)}"


def matching_pattern(patterns: dict[str, Any], path: str) -> str | None:
    """The first key that matches the whole path or its last parts, as a regular expression: PEFT's rule."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)
