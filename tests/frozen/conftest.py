import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.data.chat import TEMPLATES, byte_level
from tests.models import tiny


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A folder as the hub has them: config, weights, tokenizer.  Nobody writes to it."""
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny("llama").save_pretrained(folder)
    byte_level(TEMPLATES["chatml"]).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(whole, tmp_path) -> Callable[[], Path]:
    """Makes copies of that folder, to be spoilt."""

    def copy() -> Path:
        return Path(shutil.copytree(whole, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"))

    return copy
