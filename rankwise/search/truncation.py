"""One trained adapter cut to smaller ranks, the same rank at every site: what each rank would lose at least once.

An adapter that was trained large and cut is no worse than the best that its rank could hold by much (Eckart and Young
at every site), but it was not trained at that rank: the curve is a cheap upper bound on the rank that is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.parts import parts_of
from rankwise.adapters.spec import LoraSpec
from rankwise.data.examples import Examples
from rankwise.engine.evaluate import measured
from rankwise.surgery.bank import Bank

_NAME = "cut"


def truncated(
    bank: Bank, adapter: Adapter, ranks: Sequence[int], examples: Examples, tell: Callable[[str, float], None]
) -> list[np.ndarray]:
    """Summed losses `[n]` at each rank, of the singular triplets that do most.

    Raises:
        BankError: the adapter does not fit the base.
    """
    plain = adapter.plain()
    parts = {path: parts_of(factors) for path, factors in plain.sites.items()}
    switchable = {path: own.switchable() for path, own in parts.items()}
    bank.put(_NAME, Adapter(LoraSpec(form="adalora"), switchable, plain.modules, tokens=plain.tokens))
    try:
        found = []
        for number, rank in enumerate(ranks):
            tell(f"ladder: one adapter of rank {ranks[-1]}, cut", number / len(ranks))
            for factors in bank.adapter(_NAME).sites.values():
                factors.leave_out_all_but(torch.arange(min(rank, factors.rank)))
            found.append(measured(bank, [_NAME], examples)[0][0])
        return found
    finally:
        bank.remove(_NAME)
