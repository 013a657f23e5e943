from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.conftest import _small_world  # noqa: F401  # one thread, as for all tiny models
from tests.jobs.world import write_adapter, write_model
from tests.serving.server import Reference, Running, running

SPECS = {
    "a": {},
    "b": {"size": 0.5, "rank": 2},
    "ab": {"size": 0.4, "targets": "attention"},  # a name that holds others
    "dora": {"form": "dora"},
    "head": {"targets": ("q_proj", "lm_head"), "size": 0.4},
}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Path:
    """`model`, and adapters of it by name under `adapters`."""
    folder = tmp_path_factory.mktemp("shelf")
    write_model(folder / "model")
    (folder / "adapters").mkdir()
    for name, spec in SPECS.items():
        write_adapter(folder / "adapters" / name, folder / "model", **spec)
    return folder


@pytest.fixture(scope="session")
def reference(shelf) -> Reference:
    return Reference(shelf / "model")


@pytest.fixture(scope="module")
def server(shelf) -> Iterator[Running]:
    """Two of the adapters fit in memory."""
    named = {name: shelf / "adapters" / name for name in SPECS}
    with running(shelf / "model", adapters=named, max_loaded=2) as found:
        yield found
