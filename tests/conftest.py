import os

# Read when torch is imported.  Threads that spin while they wait lose a time slice of 10 ms at every barrier wherever
# another program wants the same cores, and tiny models have a barrier every 10 µs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(2)

# How long an example takes says more of a shared machine than of the code.
hypothesis.settings.register_profile("shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
