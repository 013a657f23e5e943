import os
import platform
import subprocess
import sys

import pytest

TELL = "import os, sys\nprint(os.getpid(), os.environ.get('GLIBC_TUNABLES', 'none'), file=sys.stderr)\n"


@pytest.mark.parametrize(("verb", "heavy"), [("train", True), ("evaluate", True), ("inspect", False)])
def test_a_verb_that_trains_begins_anew_with_its_heap_set_up_once(tmp_path, verb, heavy):
    (tmp_path / "sitecustomize.py").write_text(TELL)  # runs whenever an interpreter starts
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-c", "from rankwise.cli.launch import main; main()", verb, "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"rankwise {verb}" in done.stdout or f" {verb} " in done.stdout
    starts = [line.split() for line in done.stderr.splitlines()]
    begun_anew = heavy and platform.libc_ver()[0] == "glibc"
    assert [told for _, told in starts] == ["none", "glibc.malloc.tcache_count=0"][: 1 + begun_anew]
    assert len({process for process, _ in starts}) == 1
