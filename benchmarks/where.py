"""Which machine and which versions a measurement was made with."""

from __future__ import annotations

import os
from importlib.metadata import version

from rankwise.jobs.machine import processor_name, versions


def machine(*others: str) -> dict[str, object]:
    """For the record; `others` are packages that were measured against."""
    return {"processor": processor_name(), "cores": os.cpu_count(), **versions(), **{o: version(o) for o in others}}
