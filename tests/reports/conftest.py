import pytest

from rankwise.reports.page import write_report
from tests.reports.folders import write_run


@pytest.fixture(scope="session")
def page(tmp_path_factory) -> str:
    """The report of a whole run, with hostile and Chinese samples in it."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "docstrings")
    return write_report(folder).read_text(encoding="utf-8")
