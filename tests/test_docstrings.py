"""What docstrings say of errors: that they exist, and of public names that none is left out."""

import ast
import builtins
import importlib
import inspect
import re
from pathlib import Path
from textwrap import dedent
from types import FunctionType

import pytest

import rankwise

HOUSE = Path(rankwise.__file__).parent
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def said(docstring: str | None) -> set[str]:
    """The names under `Raises:` and `Warns:`."""
    sections = re.findall(r"^(?:Raises|Warns):\n((?: .*\n?|\n)+)", inspect.cleandoc(docstring or ""), re.M)
    lines = [line for section in sections for line in section.splitlines() if re.match(r" {4}\S", line)]
    return {name.strip() for line in lines for name in line.partition(":")[0].split(",")}


def test_what_is_said_is_read():
    assert said(
        "It.\n\n    Raises:\n        A, B: no\n            C: more of that\n        D: no\n\n    Warns:\n        E: hm"
    ) == set("ABDE")
    assert said("Raises nothing.") == said(None) == set()


@pytest.mark.parametrize("path", sorted(HOUSE.rglob("*.py")), ids=lambda path: str(path.relative_to(HOUSE)))
def test_every_error_that_is_told_of_is_one_that_is_known_there(path):
    told = {name: node.name for node in documented(path) for name in said(ast.get_docstring(node))}
    parts = ("rankwise", *path.relative_to(HOUSE).with_suffix("").parts)
    if not told or parts[-1] == "__main__":
        return
    known = vars(importlib.import_module("rankwise.errors")) | vars(builtins)
    if told.keys() - known.keys():
        known = known | vars(importlib.import_module(".".join(parts)))
    for name, where in told.items():
        assert isinstance(known.get(name), type), f"{where}: {name}"
        assert issubclass(known[name], BaseException), f"{where}: {name}"


def documented(path: Path) -> list[Documented]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, Documented)]


def public() -> dict[str, tuple[FunctionType, set[str]]]:
    """Every public function and method with the errors that are told of; of another constructor, its class's too."""
    found = {}
    for name in rankwise.__all__:
        value = getattr(rankwise, name)
        if inspect.isfunction(value):
            found[name] = value, said(value.__doc__)
            continue
        for method, own in vars(value).items():
            of_class = said(value.__doc__) if isinstance(own, classmethod) else set()
            function = getattr(own, "__func__", getattr(own, "fget", own))
            if inspect.isfunction(function) and not method.startswith("_"):
                found[f"{name}.{method}"] = function, said(function.__doc__) | of_class
    return found


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_an_error_that_a_public_name_raises_itself_is_told_of(name):
    function, told = PUBLIC[name]
    (tree,) = ast.parse(dedent(inspect.getsource(function))).body
    calls = [node.exc.func for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    assert {ast.unparse(call) for call in calls} <= told
