"""An adapter merged beneath: for a while a model is base + adapter, and another adapter can be trained on that.

The base's own weights are kept aside and put back, as in merging (`surgery/merge.py`).  Meanwhile the model is an
ordinary one with a fingerprint of its own, and everything works on it at the speed of a bare base.
"""

from __future__ import annotations

import copy

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.combining import Combination, combine
from rankwise.errors import SpecError
from rankwise.surgery.bank import Bank
from rankwise.surgery.merge import Merged

_OTHERWISE = "train it further itself with --continue-from, or write base and adapter as one model with rankwise merge"


class Beneath:
    """An adapter of a bank, taken out of it and merged beneath the model until `lift`; the bank is empty then.

    Attributes:
        adapter: a copy of it.
        report: what merging did.

    Raises:
        SpecError: it is no sum of W and a change of low rank, or the base is held in codes.
        MergeError: as of merging; all is as it was.
    """

    def __init__(self, bank: Bank, name: str) -> None:
        _check(bank, name)
        self.adapter: Adapter = copy.deepcopy(bank.adapter(name).plain())
        merged = Merged(name, [bank.model.get_submodule(path) for path in self.adapter.sites])
        self.report, self._merged, self._bank, self._lifted = merged.report, merged, bank, False
        bank.remove(name)  # puts the layers back in their places, with the weights that they have now
        bank.renew()

    def lift(self) -> None:
        """Puts the base's own weights back; a bank that is not empty must be closed afterwards."""
        if self._lifted:
            return
        model = self._bank.model
        flags = {path: own.requires_grad for path, own in model.named_parameters(remove_duplicate=False)}
        self._merged.undo()
        self._lifted = True
        if not self._bank.names:  # one that holds adapters has flags of its own to bring back
            for path, own in model.named_parameters(remove_duplicate=False):
                own.requires_grad_(flags[path])
            self._bank.renew()

    def joined(self, upper: Adapter) -> Combination:
        """This adapter and one that was trained on top of it, as one on the bare base: ranks add up, exactly."""
        return combine({"beneath": self.adapter, "on top": upper})


def _check(bank: Bank, name: str) -> None:
    adapter = bank.adapter(name)
    problems = []
    if any(factors.m is not None for factors in adapter.sites.values()):
        problems.append("it is of form dora, whose magnitudes are no change that another could be added to")
    if adapter.modules or adapter.tokens:
        problems.append("it has modules trained whole or rows of tokens, which cannot be added up")
    if bank.storage != "dense":
        problems.append(f"the base is held in {bank.storage}, and merged it would be held dense")
    if problems:
        raise SpecError(f"nothing can be trained on top of this adapter: {'; '.join(problems)}", hint=_OTHERWISE)
