"""Old documents mixed in with new ones, so that what was learnt before is not forgotten.

How many an epoch has, and which, follows from the counts, the seed and the epoch alone.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from rankwise.settings import Settings

_SHUFFLE = 1  # what sets this permutation apart from those of epochs (`data/order.py`)


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

    def drawn(self, epoch: int, fresh: int, seed: int) -> np.ndarray:
        """The old documents of an epoch, by their numbers behind the new ones'.

        None comes twice in an epoch, and none again before all have come.
        """
        count = self.count(fresh)
        shuffled = np.random.Generator(np.random.PCG64([seed, 0, _SHUFFLE])).permutation(self.documents)
        return fresh + shuffled[(epoch * count + np.arange(count)) % self.documents]
