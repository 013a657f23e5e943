"""One nested adapter at each of its ranks: what each would lose, from an adapter that has learnt them all.

Beside `truncated`, which cuts an adapter that has learnt one rank alone: here each rank has been trained, if together
with the others, so the curve is nearer to that of adapters trained one by one (docs/engine.md has it measured).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rankwise.adapters.adapter import Adapter
from rankwise.data.examples import Examples
from rankwise.engine.evaluate import measured
from rankwise.surgery.bank import Bank

_NAME = "nested"


def prefixed(
    bank: Bank, adapter: Adapter, ranks: Sequence[int], examples: Examples, tell: Callable[[str, float], None]
) -> list[np.ndarray]:
    """Summed losses `[n]` at each rank, of the first so many directions as they lie; the documents go by once.

    Raises:
        BankError: the adapter does not fit the base.
        SpecError: its first directions are no adapter by themselves.
    """
    bank.put(_NAME, adapter)
    try:
        ways = [bank.prefix(_NAME, rank) for rank in ranks]
        said = f"ladder: one nested adapter of rank {ranks[-1]}"
        losses, _ = measured(bank, ways, examples, progress=lambda done, of: tell(said, done / of))
        return list(losses)
    finally:
        bank.remove(_NAME)
