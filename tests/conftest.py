import os

# Read when torch is imported.  Threads that spin while they wait lose a time slice of 10 ms at every barrier wherever
# another program wants the same cores, and tiny models have a barrier every 10 µs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
