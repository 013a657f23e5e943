"""What a package of rankwise needs beside its code: everything that lies in the folder goes along, licence first."""

import importlib
import re
from pathlib import Path

import pytest

import rankwise

HOUSE = Path(rankwise.__file__).parent
ROOT = HOUSE.parent
tomllib = pytest.importorskip("tomllib")
SAID = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUP = SAID["tool"]["setuptools"]
DATA = SETUP["package-data"]["*"]
(NATIVE,) = SETUP["ext-modules"]
SOURCES = {*NATIVE["sources"], *NATIVE["depends"]}


def test_the_licence_is_there_and_is_the_one_that_is_declared():
    assert SAID["project"]["license"] == "Apache-2.0"
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in SAID["project"]["license-files"]]
    assert [re.findall(r"Apache License\s+Version 2\.0", text) != [] for text in texts] == [True]
    assert "END OF TERMS AND CONDITIONS" in texts[0]


def test_every_file_that_lies_in_the_package_is_packed():
    """Each is a module in a package, data by a pattern, or a source of the compiled kernels; nothing else is there."""
    files = [path for path in HOUSE.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so", ".pyd")]
    left = [path for path in files if path.suffix != ".py" and not any(path.match(pattern) for pattern in DATA)]
    assert {str(path.relative_to(ROOT)) for path in left} == SOURCES
    assert all((path.parent / "__init__.py").exists() for path in files)


@pytest.mark.parametrize("pattern", DATA)
def test_every_pattern_of_data_means_a_file(pattern):
    assert list(HOUSE.rglob(pattern))


def test_every_header_that_a_source_includes_goes_along():
    for source in SOURCES:
        for header in re.findall(r'^#include "(.+)"', (ROOT / source).read_text(encoding="utf-8"), re.M):
            assert f"rankwise/kernels/{header}" in SOURCES, source


def test_what_else_is_declared_is_there():
    assert (ROOT / SAID["project"]["readme"]).exists()
    for entry in SAID["project"]["scripts"].values():
        module, _, function = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
