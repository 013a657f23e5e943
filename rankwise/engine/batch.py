"""Documents as a model is given them, and where in what comes out they are judged.

Shape letters: D documents, S judged items, U outputs of the model (one a token, or one a row), G segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.data.stream import Stream


@dataclass(frozen=True)
class Batch:
    """Packed or row by row.

    Attributes:
        inputs: what the model is called with, by name; whole numbers int64, others float32.
        sources: int64 `[S]`, which of the U outputs are read.
        targets: int64 `[S]`, what should be there.
        owners: int64 `[S]`, which of the D documents each belongs to, ascending.
        documents: D.
        stream: how the documents are packed; None where each has a row.
        lengths: tokens of each document in its row; None where all are as long as the rows.
    """

    inputs: dict[str, np.ndarray]
    sources: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    documents: int
    stream: Stream | None = None
    lengths: np.ndarray | None = None


def packed_batch(stream: Stream, first_position: int = 0) -> Batch:
    """A stream without padding; positions are counted from `first_position` in each document."""
    inputs = {"input_ids": stream.tokens[None], "position_ids": stream.positions[None] + first_position}
    return Batch(inputs, stream.sources, stream.targets, stream.owners, len(stream.documents), stream)


def row_batch(stream: Stream, pad: int = 0) -> Batch:
    """A row a document, of a stream in which nothing is shared."""
    tokens, mask = padded(np.split(stream.tokens, stream.bounds[1:-1]), pad)
    sources = stream.owners * tokens.shape[1] + stream.positions[stream.sources]
    inputs = {"input_ids": tokens, "attention_mask": mask}
    return Batch(inputs, sources, stream.targets, stream.owners, len(stream.documents), lengths=stream.lengths)


def padded(rows: Sequence[np.ndarray], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one length, filled up on the right, and 1 where they are not; int64, each `[D, longest]`."""
    lengths = np.array([len(row) for row in rows])
    there = np.arange(lengths.max()) < lengths[:, None]
    out = np.full(there.shape, fill, dtype=np.int64)
    out[there] = np.concatenate(rows)
    return out, there.astype(np.int64)
