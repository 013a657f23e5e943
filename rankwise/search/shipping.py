"""The adapter that a search leaves: the chosen one, with what it does without taken out.

What is taken out leaves a rank for each layer.  Whether cutting gave anything away is seen against a fresh adapter that
is trained at these very ranks, at full length, from the same seed and at the same rate and alpha: the cut one is kept
unless that is measurably better on the documents to confirm on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.parts import parts_of
from rankwise.engine.evaluate import measured
from rankwise.errors import DataError, SpecError
from rankwise.search.case import Case
from rankwise.search.compression import compress
from rankwise.search.rule import bounds
from rankwise.search.statistics import difference
from rankwise.search.study import Candidate
from rankwise.search.trials import Trials

_WHOLE, _SMALL, _SHIPPED = "whole", "small", "shipped"


def ship(case: Case, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compresses the chosen adapter on the documents to choose by, and saves it, or one trained at its ranks.

    Where nothing is shown to be dispensable it is saved as it is.

    Raises:
        AdapterFileError, RunFolderError: of writing.
    """
    trials = case.trials
    adapter = trials.adapter("confirm", case.candidate(), 0)
    tolerance, small, losses = _compressed(trials, adapter)
    items = trials.items("confirm").sum()
    why = _no_control(case, adapter, small)
    control, kept = None, small
    if not why:
        control, kept = _control(case, small, losses[1])
    trials.bank.put(_SHIPPED, kept)
    try:
        trials.bank.save(_SHIPPED, folder, facts)
    finally:
        trials.bank.remove(_SHIPPED)
    plain = adapter.plain()
    return {
        "parameters": {"whole": adapter.parameter_count(), "compressed": small.parameter_count()},
        "losses": {
            "base": float(trials.base("confirm").sum() / items),
            "whole": float(losses[0].sum() / items),
            "compressed": float(losses[1].sum() / items),
        },
        "tolerance": tolerance,
        "ranks": {path: small.sites[path].rank if path in small.sites else 0 for path in plain.sites},
        "control": control,
        "no_control": why,
        "spectrum": {path: parts_of(factors).values.tolist() for path, factors in plain.sites.items()},
    }


def _compressed(trials: Trials, adapter: Adapter) -> tuple[float, Adapter, np.ndarray]:
    """What may be lost, what is left, and summed losses `[2, n]` to confirm by, of the whole and of that."""
    bank, documents = trials.bank, trials.documents
    bank.put(_WHOLE, adapter)
    try:
        tolerance, small = 0.0, adapter
        try:
            settings: dict[str, Any] = {"frequencies": trials.documents.frequencies, "advance": trials.tell}
            found = compress(bank, _WHOLE, documents.choose, **settings)
            tolerance, small = found.tolerance, found.adapter
        except (DataError, SpecError) as reason:
            trials.tell(f"ship: nothing is taken out, {reason.message.splitlines()[0]}", 1.0)
        bank.put(_SMALL, small)
        return tolerance, small, measured(bank, [_WHOLE, _SMALL], documents.confirm)[0]
    finally:
        for name in (_WHOLE, _SMALL):
            if name in bank:
                bank.remove(name)


# ── against training at these ranks ──────────────────────────────────────────────────────────────────────────────────


def _no_control(case: Case, whole: Adapter, small: Adapter) -> str:
    """Why nothing is trained at the ranks that are left; empty where it is."""
    if small is whole:
        return "nothing was taken out"
    if not case.budget.control:
        return "its budget does not pay for one more full run"
    if not small.sites:
        return "no layer keeps a rank"
    if case.spec.form != "lora" or case.spec.init == "eva":
        return "form adalora and init eva give the ranks out themselves"
    return ""


def _control(case: Case, small: Adapter, losses: np.ndarray) -> tuple[dict[str, Any], Adapter]:
    """A fresh adapter of these ranks against what was cut, and which of the two is kept."""
    at: dict[str, Any] = {"targets": tuple(small.sites), "exclude": (), "layers": "", "alpha_pattern": {}}
    at |= {"rank": small.spec.rank, "rank_pattern": small.spec.rank_pattern}
    candidate = Candidate(
        f"trained at the ranks left of {case.candidate().name}", case.spec.model_copy(update=at), case.run
    )
    ((found,),) = case.trials.confirmed("ship", [candidate], [0])
    if found.confirm is None:
        return {"status": found.status, "loss": None, "delta": None, "kept": "compressed"}, small
    items = case.trials.items("confirm")
    delta = difference(found.confirm[None], losses[None], items, case.noise)
    better = delta.interval()[1] < 0
    told = {"status": found.status, "loss": float(found.confirm.sum() / items.sum()), "delta": bounds(delta)}
    kept = case.trials.adapter("ship", candidate, 0) if better else small
    return told | {"kept": "trained" if better else "compressed"}, kept
