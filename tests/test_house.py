"""What must start at once and what must work anywhere, tried in a fresh Python; the arrows are import-linter's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise
from rankwise.engine.forward import Forward
from rankwise.kernels.library import native, serves
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import spec, trained
from tests.models import tiny

HOUSE = Path(rankwise.__file__).parent
NAMES = ["spec", "scaling", "presets", "blocks", "selection"]
TORCH_FREE = ["settings", "errors", "cache", *(f"adapters.{name}" for name in NAMES), "engine.run"]
PLANNING = [f"planning.{path.stem}" for path in sorted((HOUSE / "planning").glob("*.py")) if path.stem != "__init__"]
REPORTS = [f"reports.{path.stem}" for path in sorted((HOUSE / "reports").glob("*.py")) if path.stem != "__init__"]


def loaded_by(modules: list[str], path: str = "") -> dict[str, list[str]]:
    """Module → what is heavy and loaded once it has been imported, after those before it."""
    script = f"""
import importlib, json, sys
sys.path[:0] = [{path!r}] if {path!r} else []
found = {{}}
for name in {modules!r}:
    importlib.import_module("rankwise." + name)
    found[name] = sorted({{"torch", "transformers", "safetensors"}} & sys.modules.keys())
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_reports_plans_and_what_is_asked_for_know_no_torch():
    assert len(REPORTS) > 5
    assert len(PLANNING) > 5
    free = [*TORCH_FREE, *REPORTS, *PLANNING]
    assert loaded_by(free) == {name: [] for name in free}


@pytest.fixture(scope="session")
def uncompiled(tmp_path_factory) -> Path:
    """The package as it is where there was no C compiler."""
    place = tmp_path_factory.mktemp("uncompiled")
    shutil.copytree(HOUSE, place / "rankwise", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return place


def facts() -> dict[str, Any]:
    """What the engine is made of and what it finds, in whichever Python this runs."""
    torch.manual_seed(0)
    with Bank(tiny("llama", torch.bfloat16)) as bank:
        trained(bank, "a", spec("all-linear"), size=0.1)
        with Forward(bank) as forward:
            losses = forward.measure(random_corpus([40, 25, 60]), range(3), [("a", 3)]).documents
            found = {"fused": forward.fused, "layout": forward.layout, "losses": losses.tolist()}
    return found | {"home": rankwise.__file__, "served": serves(torch.ones(1, dtype=torch.bfloat16))}


def test_without_the_compiled_kernels_the_engine_gives_the_same_losses(uncompiled):
    script = "import json; from tests.test_house import facts; print(json.dumps(facts()))"
    where = {"cwd": uncompiled, "env": os.environ | {"PYTHONPATH": f"{uncompiled}{os.pathsep}{HOUSE.parent}"}}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, **where)
    plain, here = json.loads(done.stdout), facts()
    assert plain["home"].startswith(str(uncompiled))
    assert (plain["served"], plain["fused"]) == (False, 0)
    assert here["served"] == (native() is not None) == (here["fused"] > 0)
    assert plain["layout"] == here["layout"] == "packed"
    assert plain["losses"] == pytest.approx(here["losses"], rel=0.02)
