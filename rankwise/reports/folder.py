"""A run's folder: what its files are called, and how a written page gets there whole."""

from __future__ import annotations

from pathlib import Path

RECORD = "rankwise.json"
METRICS = "metrics.jsonl"
EVALUATION = "evaluation.json"
SAMPLES = "samples.json"
REPORT = "report.html"
CARD = "README.md"


def place(folder: Path, name: str, text: str) -> Path:
    """Writes a page beside its place and renames it in: a reader meets the old page or the whole new one.

    Not flushed to the disk as adapters are: a page lost with the power can be made again.
    """
    path = folder / name
    beside = folder / f".{name}.part"
    # A lone surrogate, which JSON can spell and UTF-8 cannot, must not cost the page.
    beside.write_bytes(text.encode("utf-8", errors="replace"))
    beside.replace(path)
    return path
