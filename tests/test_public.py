"""The public names: there, explained, and at no cost until they are used."""

import ast
import importlib
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import rankwise

HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "pydantic", "pyarrow", "matplotlib"}


def python(script: str) -> object:
    """What a fresh Python prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", rankwise.__all__)
def test_every_public_name_is_there_and_explained(name):
    value = getattr(rankwise, name)
    assert value.__name__ == name
    text = inspect.getdoc(value) or ""
    assert len(text.split()) > 3
    # a class without a docstring shows its parent's (or one that dataclasses make), which says nothing of it
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own
    assert not own.startswith(f"{name}("), "made by dataclasses"


def test_the_list_has_no_double_and_is_sorted_as_people_read_it():
    assert len(set(rankwise.__all__)) == len(rankwise.__all__)
    assert dir(rankwise) == sorted(rankwise.__all__)
    assert rankwise.__doc__


def test_a_star_import_brings_the_public_names_and_nothing_else():
    space: dict[str, object] = {}
    exec("from rankwise import *", space)
    assert space.keys() - {"__builtins__"} == set(rankwise.__all__)


def test_the_import_alone_loads_nothing_that_is_heavy():
    loaded = python("import json, sys, rankwise; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))")
    assert "rankwise" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize(
    ("name", "light"),
    [("RankwiseError", HEAVY), ("LoraSpec", HEAVY - {"pydantic"}), ("Run", HEAVY - {"pydantic"})],
)
def test_a_name_loads_no_more_than_it_needs(name, light):
    script = f"import json, sys, rankwise; rankwise.{name}; print(json.dumps(list(sys.modules)))"
    assert not light & {module.split(".")[0] for module in python(script)}


def test_a_name_is_the_very_object_of_its_home():
    for name in rankwise.__all__:
        home = importlib.import_module(getattr(rankwise, name).__module__)
        assert getattr(home, name) is getattr(rankwise, name)
        assert getattr(rankwise, name) is getattr(rankwise, name)


def test_an_unknown_name_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="module 'rankwise' has no attribute 'serach'"):
        _ = rankwise.serach
    assert not hasattr(rankwise, "__wrapped__")
    with pytest.raises(ImportError, match="cannot import name 'serach'"):
        exec("from rankwise import serach")


def test_type_checkers_see_the_names_that_are_there_at_the_homes_they_come_from():
    """The TYPE_CHECKING block is for type checkers alone; here it is read as text, so that the two cannot part."""
    tree = ast.parse(Path(rankwise.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == {name: f"rankwise.{home}" for name, home in rankwise._HOMES.items()}
    assert told.keys() == set(rankwise.__all__)
    assert all(alias.asname is None for node in block.body for alias in node.names)
    assert all(told[name] == getattr(rankwise, name).__module__ for name in told)


def test_public_values_can_be_sent_to_another_process():
    """Found again by their names, which are resolved late."""
    for value in (rankwise.LoraSpec(rank=3), rankwise.Run(lr=1e-3), rankwise.Loop(), rankwise.RankwiseError("what")):
        again = pickle.loads(pickle.dumps(value))
        assert type(again) is type(value)
        assert again == value or str(again) == str(value)


def test_the_package_says_that_it_is_typed():
    assert (Path(rankwise.__file__).parent / "py.typed").exists()
