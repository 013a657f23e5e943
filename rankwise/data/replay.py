"""Old documents mixed in with new ones, so that what was learnt before is not forgotten.  Torch- and numpy-free.

Which ones an epoch has is said by its order (`data/order.py`).
"""

from __future__ import annotations

from pydantic import Field

from rankwise.settings import Settings


class Replay(Settings):
    """The last documents of those that are learnt from are old ones.

    Args:
        documents: how many.
        share: of the documents of an epoch, how many are old.
    """

    documents: int = Field(ge=1)
    share: float = Field(gt=0, lt=1)

    def count(self, fresh: int) -> int:
        """Old documents in an epoch with so many new ones: the share, or all where there are not so many."""
        return min(self.documents, max(1, round(fresh * self.share / (1 - self.share))))
