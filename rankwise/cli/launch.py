"""The door of the command line: verbs that train or measure begin as a program whose heap is set up for it."""

from __future__ import annotations

import sys

from rankwise.kernels.heap import begin_anew

_HEAVY = ("quickstart", "search", "train", "evaluate", "compress")


def main() -> None:
    """The entry point of `rankwise`."""
    if sys.argv[1:2] and sys.argv[1] in _HEAVY:
        begin_anew()
    from rankwise.cli.app import main as run

    run()
