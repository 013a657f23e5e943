import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _collected() -> Iterator[None]:
    """Trainers collect garbage at every turn; what is there already need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
