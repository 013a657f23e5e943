"""Every error says what is wrong and the way out, is one of Python's own too, and can be sent to another process."""

import copy
import inspect
import pickle
import re
import warnings

import pytest

from rankwise import errors
from rankwise.errors import RankwiseError, listing, nearest

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, RankwiseError)]


def test_the_tree_in_the_docstring_is_the_tree_there_is():
    told = re.findall(r"[├└]── (\w+)", errors.__doc__)
    assert sorted(told) == sorted(kind.__name__ for kind in KINDS if kind is not RankwiseError)
    assert all(re.search(rf"── {name} +\S", errors.__doc__) for name in told), "one of them is not explained"


@pytest.mark.parametrize("kind", KINDS)
def test_the_hint_stands_on_a_line_of_its_own(kind):
    error = kind("base.safetensors: cut short", hint="copy it again")
    assert str(error) == "base.safetensors: cut short\n  → copy it again"
    assert (error.message, error.hint) == ("base.safetensors: cut short", "copy it again")
    assert str(kind("no way out")) == "no way out"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_nothing_is_lost_on_the_way_between_processes(kind, again):
    error = kind("what", hint="how")
    other = again(error)
    assert type(other) is kind
    assert (other.message, other.hint, str(other)) == ("what", "how", str(error))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not RankwiseError])
def test_each_is_caught_by_people_who_know_only_pythons_own(kind):
    own = (ValueError, RuntimeError, ImportError)
    assert sum(issubclass(kind, ordinary) for ordinary in own) == 1
    with pytest.raises(own):
        raise kind("what")


def test_a_hint_must_be_named_so_that_no_second_argument_is_lost():
    with pytest.raises(TypeError):
        RankwiseError("what", "how")


def test_a_warning_is_a_user_warning_and_no_error():
    with pytest.warns(UserWarning, match="probably not as meant"):
        warnings.warn("probably not as meant", errors.RankwiseWarning, stacklevel=1)
    assert not issubclass(errors.RankwiseWarning, RankwiseError)


def test_a_long_list_ends_in_a_count_of_the_rest():
    assert listing([]) == ""
    assert listing(["one", "two"]) == "  one\n  two"
    assert listing(f"line {i}" for i in range(20)).count("\n") == 19
    lines = listing(f"line {i}" for i in range(25)).splitlines()
    assert lines[19:] == ["  line 19", "  … and 5 more"]
    assert listing("abc", most=1) == "  a\n  … and 2 more"


def test_the_nearest_word_is_offered_and_a_far_one_is_not():
    known = ["rank", "alpha", "targets"]
    assert nearest("rnak", known) == "; did you mean 'rank'?"
    assert nearest("target", known) == "; did you mean 'targets'?"
    assert nearest("lr", known) == nearest("", known) == nearest("x", []) == ""
