"""How an adapter began, in one sentence."""

from __future__ import annotations

from rankwise.reports.numbers import counted, duration
from rankwise.reports.run import Start


def started(start: Start, layers: int) -> str:
    """`eva: 128 documents in 12 s; 180 of 210 layers have come to another rank`."""
    looked = f"{counted(start.documents, 'document')} in " if start.documents else ""
    notes = [
        f"{start.init}: {looked}{duration(start.seconds)}",
        f"{start.changed:,} of {counted(layers, 'layer')} have come to another rank" if start.changed else "",
        f"directions of {counted(start.unsettled, 'input')} had not settled by then" if start.unsettled else "",
        f"{counted(start.unreached, 'layer')} met no token, and began by chance" if start.unreached else "",
    ]
    return "; ".join(note for note in notes if note)
