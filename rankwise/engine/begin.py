"""A fresh adapter in a bank, whatever its start needs: chance, the weights, or documents that are looked at.

Starts that are computed (`pissa`, `olora`, `eva`, `lora_ga`) can be kept in a run's folder, and are taken from there
when it is resumed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.spec import DATA_STARTS, LoraSpec
from rankwise.adapters.starts import WEIGHT_STARTS
from rankwise.data.examples import Examples
from rankwise.engine.folder import RunFolder
from rankwise.engine.look import Look
from rankwise.engine.run import Start
from rankwise.engine.state import Checkpoint, check_same, read_start, save_start
from rankwise.errors import RankwiseWarning, RunFolderError
from rankwise.surgery.bank import Bank
from rankwise.surgery.begin import made, whole_modules

Advance = Callable[[float], None]  # how far it is, from 0 to 1

COMPUTED_STARTS = (*WEIGHT_STARTS, *DATA_STARTS)


@dataclass(frozen=True)
class Begun:
    """How an adapter began.

    Attributes:
        init: of the spec.
        documents: how many were looked at.
        seconds: what that took.
        changed: layers whose rank is not the one that was asked for (`eva`).
        unsettled: inputs of layers whose directions still moved when there were no more documents (`eva`).
        unreached: layers that no token of these documents reached, which begin by chance, as `kaiming`.
    """

    init: str
    documents: int = 0
    seconds: float = 0.0
    changed: int = 0
    unsettled: int = 0
    unreached: int = 0

    def record(self) -> dict[str, Any]:
        return asdict(self)


def begin(
    bank: Bank,
    name: str,
    spec: LoraSpec,
    corpus: Examples,
    seed: int = 0,
    *,
    start: Start | None = None,
    out: RunFolder | None = None,
    advance: Advance | None = None,
) -> Begun:
    """Adds a fresh adapter to a bank; for starts that need no documents it is `bank.add`.

    Args:
        bank, name, spec: as for `bank.add`.
        corpus: what training will learn from.
        seed: of all chance, and of which documents are looked at; the same seed gives the same adapter.
        start: how documents are looked at.
        out: a held run folder in which a start that was computed is kept; one that is there is taken up again.
        advance: is told how far it is, from 0 to 1.

    Warns:
        RankwiseWarning: the start in `out` is damaged and computed again, or could not be kept.

    Raises:
        BankError, TargetError: as `bank.add`.
        SpecError: the start has nothing for such a layer or rank (all listed), `eva` is to change given ranks, or a
            start out of documents is given those of another task than a causal language model's.
        DataError: no documents, or too few supervised tokens in them.
        RunFolderError: the start in `out` belongs to other settings, documents or another base.
        TrainingError: inputs or gradients are not finite.
    """
    start = start or Start()
    if spec.init not in COMPUTED_STARTS:
        bank.add(name, spec, seed)
        return Begun(spec.init)
    identity = {
        "base": bank.base_fingerprint,
        "number format": str(getattr(bank.model, "dtype", None)),
        "documents": corpus.digest,
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "start": start.model_dump(mode="json"),
    }
    begun = _taken_up(bank, name, seed, identity, out) if out is not None else None
    if begun is not None:
        return begun
    began = time.monotonic()
    begun = Begun(spec.init)
    if spec.init in WEIGHT_STARTS:
        bank.add(name, spec, seed)
    else:
        look = Look(bank, name, spec, corpus, seed, start, advance or (lambda share: None))
        found = look.varying() if spec.init == "eva" else look.pulled()
        bank.put(name, found.adapter, seed)
        begun = Begun(spec.init, found.documents, 0.0, found.changed, found.unsettled, found.unreached)
    begun = replace(begun, seconds=time.monotonic() - began)
    if out is not None:
        _keep(bank.adapter(name), begun, identity, out)
    return begun


def _keep(adapter: Adapter, begun: Begun, identity: dict[str, Any], out: RunFolder) -> None:
    factors = {f"{path}.{part}": getattr(own, part) for path, own in adapter.sites.items() for part in ("A", "B")}
    numbers = {"identity": identity, "spec": adapter.spec.model_dump(mode="json"), "begun": begun.record()}
    try:
        save_start(out.checkpoints, Checkpoint(0, numbers, {"factors": factors}))
    except RunFolderError as error:
        warnings.warn(f"the start is not kept, and resuming will compute it again: {error.message}", RankwiseWarning, 3)


def _taken_up(bank: Bank, name: str, seed: int, identity: dict[str, Any], out: RunFolder) -> Begun | None:
    """The start that is kept in a folder, put into the bank; None where there is none that is whole."""
    kept, problem = read_start(out.checkpoints)
    if problem is not None:
        warnings.warn(f"the start that was kept is damaged, and is computed again: {problem}", RankwiseWarning, 3)
    if kept is None:
        return None
    check_same(kept.numbers["identity"], identity)
    spec, factors = LoraSpec(**kept.numbers["spec"]), kept.tensors["factors"]
    paths = dict.fromkeys(key.rpartition(".")[0] for key in factors)
    sites = {path: made(spec, bank.sites[path], factors[f"{path}.A"], factors[f"{path}.B"]) for path in paths}
    whole = whole_modules(spec, bank.sites, bank.modules)
    bank.put(name, Adapter(spec, sites, whole, tokens=bank.vocabulary.begun(spec)), seed)
    return Begun(**kept.numbers["begun"])
