"""Which learning rate each trained tensor has: one for all, or LoRA+'s two (arXiv:2402.12354, §4)."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.engine.run import Run
from rankwise.surgery.bank import Bank


@dataclass(frozen=True)
class Rate:
    """Tensors that learn alike: `factor` times the run's rate.

    AdamW's decay is multiplied by the group's own rate; `weight_decay` is divided by it, so that every group decays
    as at the run's rate.  Magnitudes and rows of tokens are not decayed: their rest is where they began, not 0.
    Λ of form `adalora` learns at the rate of A.
    """

    role: str
    factor: float
    weight_decay: float
    names: tuple[str, ...]


def rates(bank: Bank, name: str | None, run: Run) -> list[Rate]:
    """Every trained tensor of an adapter in exactly one group; of the base (None) all weights learn and decay alike.

    Embeddings have no fast side: there A starts at zero and B is random, and words are met at rates of their own.
    """
    if name is None:
        learning = [path for path, weight in bank.model.named_parameters() if weight.requires_grad]
        return [Rate("whole", 1.0, run.weight_decay, tuple(learning))]
    roles: dict[str, str] = {}
    for path in bank.adapter(name).sites:
        lookup = bank.sites[path].kind.lookup
        roles |= {f"{path}.A": "A", f"{path}.B": "embedding B" if lookup else "B", f"{path}.m": "m"}
        roles[f"{path}.lam"] = "lam"
    roles |= {f"{path}.rows": "token rows" for path in bank.adapter(name).tokens}
    found: dict[str, list[str]] = {}
    for parameter, _ in bank.named_parameters(name):
        found.setdefault(roles.get(parameter, "whole"), []).append(parameter)
    groups = []
    for role, names in found.items():
        factor = run.lr_ratio if role in ("B", "m") else 1.0
        decay = 0.0 if role in ("m", "token rows") else run.weight_decay / factor
        groups.append(Rate(role, factor, decay, tuple(names)))
    return groups
