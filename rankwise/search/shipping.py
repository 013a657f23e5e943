"""The adapter that a search leaves: the chosen one, with what it does without taken out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.parts import parts_of
from rankwise.engine.evaluate import measured
from rankwise.errors import DataError, SpecError
from rankwise.search.compression import compress
from rankwise.search.trials import Trials

_WHOLE, _SHIPPED = "whole", "shipped"


def ship(trials: Trials, adapter: Adapter, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compresses an adapter on the documents to choose by, saves it, and measures it on those to confirm on.

    Where nothing is shown to be dispensable it is saved as it is.

    Raises:
        AdapterFileError, RunFolderError: of writing.
    """
    bank, documents = trials.bank, trials.documents
    bank.put(_WHOLE, adapter)
    try:
        tolerance, small = 0.0, adapter
        try:
            settings: dict[str, Any] = {"frequencies": trials.frequencies, "advance": trials.tell}
            found = compress(bank, _WHOLE, documents.choose, **settings)
            tolerance, small = found.tolerance, found.adapter
        except (DataError, SpecError) as reason:
            trials.tell(f"ship: nothing is taken out, {reason.message.splitlines()[0]}", 1.0)
        bank.put(_SHIPPED, small)
        bank.save(_SHIPPED, folder, facts)
        items = trials.items("confirm").sum()
        losses = measured(bank, [_WHOLE, _SHIPPED], documents.confirm)[0].sum(1) / items
    finally:
        for name in (_WHOLE, _SHIPPED):
            if name in bank:
                bank.remove(name)
    plain = adapter.plain()
    return {
        "parameters": {"whole": adapter.parameter_count(), "compressed": small.parameter_count()},
        "losses": {
            "base": float(trials.base("confirm").sum() / items),
            "whole": float(losses[0]),
            "compressed": float(losses[1]),
        },
        "tolerance": tolerance,
        "ranks": {path: small.sites[path].rank if path in small.sites else 0 for path in plain.sites},
        "spectrum": {path: parts_of(factors).values.tolist() for path, factors in plain.sites.items()},
    }
