import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.jobs.train import run_training
from tests.jobs.world import Listener, read, request, write_adapter, write_model, write_rows


@pytest.fixture(scope="package", autouse=True)
def _small_world(tmp_path_factory):
    """One thread, because two wait for each other longer than tiny products take; and a home without a past."""
    threads = torch.get_num_threads()
    fonts = os.environ.get("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", fonts)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """llama, tied and gpt2 (models), train.jsonl, valid.jsonl and test.jsonl (rows that no two files share)."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "llama")
    write_model(folder / "tied", tie_word_embeddings=True)
    write_model(folder / "gpt2", family="gpt2")
    write_rows(folder / "train.jsonl", range(100, 140))
    write_rows(folder / "valid.jsonl", range(200, 206))
    write_rows(folder / "test.jsonl", range(300, 312))
    return folder


@pytest.fixture(scope="session")
def adapter(world) -> Path:
    """An adapter of llama that changes every linear layer."""
    return write_adapter(world / "adapter", world / "llama")


@pytest.fixture(scope="session")
def run(world) -> dict[str, Any]:
    """A whole run of llama on train.jsonl alone: its folder, what it returned, what it told, what it recorded."""
    told = Listener()
    asked = request(world / "llama", world / "train.jsonl", world / "run", lr=1e-2, track="tensorboard")
    summary = run_training(asked, told)
    return {"out": asked.out, "summary": summary, "told": told, "record": read(asked.out / "rankwise.json")}
