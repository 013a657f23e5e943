"""How adapters are combined: what is asked for, and what each method is.  Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from rankwise.errors import SpecError, nearest
from rankwise.settings import Settings

Method = Literal["cat", "svd", "linear", "ties", "dare", "dare-ties", "knots"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Nature:
    """What a method makes of the weighted changes of a layer.

    Attributes:
        makes: in words; `{kept}` stands for the density as a share, `{dropped}` for the rest of it.
        ranked: whether it comes back to a rank, by SVD.
        density: the share of entries that it keeps by itself, and why; None where it leaves none out.
        random: whether chance has a part in it.
    """

    makes: str
    ranked: bool
    density: tuple[float, str] | None = None
    random: bool = False


_ELECTED = "the sign that their sum has is elected, and the mean taken of those that agree"
_HALF = (0.5, "as much kept as dropped: the less is kept, the more of it is noise")
NATURES: dict[Method, Nature] = {
    "cat": Nature("the sum of all changes, exactly; ranks add up", ranked=False),
    "svd": Nature("the sum of all changes, cut to the rank that comes nearest", ranked=True),
    "linear": Nature("the sum of factors, which is not the sum of the changes", ranked=False),
    "ties": Nature(
        f"of each change the largest {{kept}} of its entries; entry by entry {_ELECTED}",
        ranked=True,
        density=(0.2, "as in the paper"),
    ),
    "dare": Nature(
        "of each change {dropped} of its entries dropped by chance, the rest scaled up for them; their sum",
        ranked=True,
        density=_HALF,
        random=True,
    ),
    "dare-ties": Nature(
        "of each change {dropped} of its entries dropped by chance, the rest scaled up for them; entry by entry "
        f"{_ELECTED}",
        ranked=True,
        density=_HALF,
        random=True,
    ),
    "knots": Nature(
        "all changes in one orthonormal basis of their outputs, there the largest {kept} of each one's entries; entry "
        f"by entry {_ELECTED}",
        ranked=True,
        density=(1.0, "as in the authors' configuration for Llama 3 8B"),
    ),
}


def _known(method: Any) -> Any:
    if method not in METHODS:
        raise ValueError(f"no such method{nearest(str(method), METHODS)}; there are {', '.join(METHODS)}")
    return method


def _split(weights: Any) -> Any:
    return tuple(weights.split(",")) if isinstance(weights, str) else weights


class Recipe(Settings):
    """How adapters are made into one.

    Args:
        method: which one, as `NATURES` says; the default loses nothing.
        weights: one for each adapter, by which its ΔW is multiplied before anything else: negative takes it off, 0
            leaves the adapter out; None is 1 each.  Text such as `0.7,-0.3` is read too.
        rank: what methods come back to by SVD; None is the largest of the adapters' ranks, layer by layer.
        density: share of entries that is kept, of methods that leave some out; None is `Nature.density`.
        seed: of what is dropped by chance; None is 0.

    Raises:
        SpecError: lists every impossible value, and what the method has no use for.
    """

    method: Annotated[Method, BeforeValidator(_known)] = "cat"
    weights: Annotated[tuple[float, ...] | None, BeforeValidator(_split)] = None
    rank: Annotated[int, Field(ge=1)] | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _uses_all_of_it(self) -> Recipe:
        ways = {
            "rank": ("what becomes of the adapters' ranks is said by the method; svd takes a rank", self.nature.ranked),
            "density": (
                "it keeps every entry; ties, dare, dare-ties and knots take a density",
                self.nature.density is not None,
            ),
            "seed": ("nothing in it is left to chance; dare and dare-ties take a seed", self.nature.random),
        }
        problems = [
            f"{name} = {getattr(self, name)}: not of method {self.method}, {why}"
            for name, (why, used) in ways.items()
            if getattr(self, name) is not None and not used
        ]
        if self.weights is not None and not any(self.weights):
            problems.append("weights are all 0: nothing would be left")
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    @property
    def nature(self) -> Nature:
        return NATURES[self.method]

    @property
    def kept(self) -> float:
        """The density that is taken; 1 where nothing is left out."""
        if self.density is not None:
            return self.density
        return self.nature.density[0] if self.nature.density else 1.0

    @property
    def makes(self) -> str:
        """What the method makes of the changes, in words."""
        return self.nature.makes.format(kept=_percent(self.kept), dropped=_percent(1 - self.kept))

    @property
    def chosen(self) -> dict[str, str]:
        """What nobody asked for and was chosen, each with its reason."""
        found = {}
        if self.weights is None:
            found["weights"] = "1 each, every change in full"
        if self.rank is None and self.nature.ranked:
            found["rank"] = "the largest of the adapters', layer by layer"
        if self.density is None and self.nature.density:
            found["density"] = "{:g}, {}".format(*self.nature.density)
        if self.seed is None and self.nature.random:
            found["seed"] = "0, so that it comes out the same again"
        return found

    def weights_of(self, names: Sequence[str]) -> dict[str, float]:
        """By name, in the order of the adapters.

        Raises:
            SpecError: not one for each, or there is no adapter.
        """
        if not names:
            raise SpecError("there is no adapter to combine", hint="name two or more")
        weights = (1.0,) * len(names) if self.weights is None else self.weights
        if len(weights) != len(names):
            raise SpecError(
                f"{_count(len(weights), 'weight')} for {_count(len(names), 'adapter')} ({', '.join(names)})",
                hint="give one for each, in the same order, such as 0.7,0.3",
            )
        return dict(zip(names, weights, strict=True))


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
