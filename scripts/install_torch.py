"""Installs the pinned torch into this environment, and gigabytes of CUDA packages only where there is an NVIDIA GPU.

What pip would fetch is asked first.  On Linux the default build of torch brings CUDA along; where pip has been shown
the wheels without it (an index or a folder), the same requirement takes those.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", "constraints.txt"]

WAY_OUT = """\
torch would bring {packages}: gigabytes for a GPU that this machine does not seem to have.

  Without one: PyTorch has a build for processors alone.  Choose "CPU" under "Get started locally" on pytorch.org and
  give pip the index that is shown there, then run make again:
      export PIP_EXTRA_INDEX_URL=<that index>
  With one after all:
      make CUDA=1 …
"""


def would_install() -> list[str]:
    """Names of the packages that pip would add."""
    asked = subprocess.run(
        [*PIP, "--dry-run", "--report", "-", "torch"], stdout=subprocess.PIPE, text=True, check=False
    )
    if asked.returncode:
        raise SystemExit(asked.returncode)
    return [package["metadata"]["name"] for package in json.loads(asked.stdout)["install"]]


def has_gpu() -> bool:
    return any(Path(place).exists() for place in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg"))


def main() -> None:
    cuda = [name for name in would_install() if name.startswith(("nvidia-", "cuda-", "triton"))]
    if cuda and not has_gpu() and "--cuda" not in sys.argv:
        raise SystemExit(WAY_OUT.format(packages=", ".join(cuda)))
    raise SystemExit(subprocess.run([*PIP, "torch"], check=False).returncode)


if __name__ == "__main__":
    main()
