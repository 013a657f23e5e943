"""Base against tuned, document by document."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.reports.run import PerDocument


@dataclass(frozen=True)
class Paired:
    """Differences tuned − base in nats per token, one a document, the greatest gain first."""

    differences: tuple[float, ...]

    @property
    def documents(self) -> int:
        return len(self.differences)

    @property
    def better(self) -> int:
        return sum(difference < 0 for difference in self.differences)

    @property
    def worse(self) -> int:
        return sum(difference > 0 for difference in self.differences)

    @property
    def same(self) -> int:
        return self.documents - self.better - self.worse

    def quantile(self, share: float) -> float:
        """The difference below which this share of the documents lies; between two documents, in between."""
        place = share * (self.documents - 1)
        low = int(place)
        high = min(low + 1, self.documents - 1)
        return self.differences[low] + (place - low) * (self.differences[high] - self.differences[low])


def pair(detail: PerDocument | None, adapter: str) -> Paired | None:
    """The differences of one adapter, or None where the evaluation kept only totals."""
    if detail is None:
        return None
    triples = zip(detail.tokens, detail.base, detail.adapters[adapter], strict=True)
    return Paired(tuple(sorted((tuned - base) / tokens for tokens, base, tuned in triples)))
