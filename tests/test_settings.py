"""Settings are closed, frozen, and tell every mistake at once with the nearest right name."""

import math

import pydantic
import pytest
from pydantic import Field

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Loop, Run
from rankwise.errors import SpecError
from rankwise.settings import Settings

EVERY = pytest.mark.parametrize("kind", [Run, Loop, LoraSpec])


class Inner(Settings):
    depth: int = Field(default=1, ge=1)


class Outer(Settings):
    inner: Inner = Inner()
    width: float = 1.0


@EVERY
def test_the_defaults_stand_on_their_own(kind):
    assert kind() == kind(**kind().model_dump())
    assert hash(Run()) == hash(Run())


@EVERY
def test_an_unknown_name_is_refused_with_the_nearest_one(kind):
    for name in kind.model_fields:
        with pytest.raises(SpecError) as caught:
            kind(**{f"{name}s": 1})
        assert f"'{name}s' is not a setting; did you mean {name!r}?" in str(caught.value)


def test_a_name_like_no_other_is_refused_without_a_guess():
    with pytest.raises(SpecError) as caught:
        Run(zzzzzz=1)
    assert "'zzzzzz' is not a setting" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_all_problems_are_told_at_once_each_with_the_value_that_was_given():
    with pytest.raises(SpecError) as caught:
        Run(lr=-1, schedule="linar", warmup=2, cliip=3, betas=(0.9,))
    text = str(caught.value)
    assert text.startswith("Run cannot be built:\n")
    lines = text.splitlines()[1:]
    assert len(lines) == 5
    for start in ("lr = -1: ", "schedule = 'linar': ", "warmup = 2: ", "'cliip' is not a setting; did you mean 'clip'"):
        assert sum(line.strip().startswith(start) for line in lines) == 1, start
    assert any("betas.1" in line for line in lines)
    assert "'linear', 'cosine' or 'constant'" in text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "warmup", "eps"])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(SpecError, match=f"{name} = "):
        Run(**{name: value})


@EVERY
def test_nothing_can_be_changed_or_added_afterwards(kind):
    settings = kind()
    before = settings.model_dump()
    for name in [*kind.model_fields, "something"]:
        with pytest.raises(pydantic.ValidationError):
            setattr(settings, name, 1)
    with pytest.raises(pydantic.ValidationError):
        delattr(settings, next(iter(kind.model_fields)))
    assert settings.model_dump() == before


def test_a_list_that_was_given_is_copied_so_that_nobody_else_changes_it():
    names = ["q_proj"]
    spec = LoraSpec(targets=names)
    names.append("v_proj")
    assert spec.targets == ("q_proj",)


def test_a_validator_of_our_own_speaks_without_pydantics_preface():
    with pytest.raises(SpecError) as caught:
        LoraSpec(targets="(", rank_pattern={"[": 3})
    text = str(caught.value)
    assert "targets = '(': '(' is not a regular expression" in text
    assert "rank_pattern = {'[': 3}: '[' is not a regular expression" in text
    assert "Value error" not in text


def test_a_problem_inside_a_group_inside_a_group_is_told_with_both():
    with pytest.raises(SpecError) as caught:
        Outer(inner={"depth": 0, "deep": 1}, width="wide")
    for piece in ("inner = ", "depth = 0: ", "'deep' is not a setting; did you mean 'depth'?", "width = 'wide': "):
        assert piece in str(caught.value)


@pytest.mark.parametrize("betas", [(2.0, 0.9), (0.9, 1.0), (-0.1, 0.9)])
def test_betas_that_adamw_would_refuse_are_refused_before_a_model_is_loaded(betas):
    with pytest.raises(SpecError, match="betas"):
        Run(betas=betas)


def test_a_settings_error_is_an_ordinary_value_error_too():
    with pytest.raises(ValueError, match="lr"):
        Run(lr=0)


def test_what_was_written_as_json_comes_back_the_same():
    for settings in (Run(lr=1e-3, betas=(0.8, 0.9)), LoraSpec(targets=("q_proj",), rank_pattern={"q_proj": 2}), Loop()):
        again = type(settings)(**settings.model_dump(mode="json"))
        assert again == settings
