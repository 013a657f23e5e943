import json
from importlib.metadata import packages_distributions
from importlib.util import find_spec

import pytest

from rankwise.jobs import doctor
from rankwise.jobs.doctor import run_checks

TRACKERS = ("tensorboard", "wandb", "mlflow")


@pytest.fixture(scope="module")
def found():
    return run_checks()


def test_this_installation_is_well(found):
    json.dumps(found, allow_nan=False)
    assert found.keys() == {"versions", "machine", "optional", "products_gflops", "smoke_run"}
    smoke = found["smoke_run"]
    assert smoke["learns"] is True
    assert smoke["saves_and_loads"] is True
    assert smoke["merge_error"] < 0.02
    assert (
        smoke["last_loss"] < 0.3 * smoke["first_loss"]
    )  # not by a hair: a check that may fail by chance tells nothing
    assert all(speed > 0 for speed in found["products_gflops"].values())
    assert found["machine"]["memory_bytes"] > 2**28
    assert all(found["versions"].values())


def test_of_every_optional_package_it_says_whether_it_is_there_or_how_to_have_it(found):
    assert {"bitsandbytes", "accelerate", "datasets", *TRACKERS} <= found["optional"].keys()
    installed = packages_distributions()
    for name, said in found["optional"].items():
        there = name in installed
        assert (said == "installed") is there
        assert there or (said.startswith("missing; needed for ") and "pip install" in said)
    for name in TRACKERS:
        assert doctor._OPTIONAL[name].startswith(f"--track {name}: ")


def test_a_folder_of_the_same_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandc").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("wandc") is not None
    assert not doctor._installed("wandc")
    assert doctor._installed("json")
