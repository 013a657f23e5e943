"""How much a search spends on each question, in runs of full length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What is paid for.

    Attributes:
        noise_seeds, noise_share: how often, and at which share of the full length, one adapter is trained.
        powers: of two, times the rate where the search begins: the ladder of learning rates.
        rungs: shares of the full length at which rates are compared; half of them stay each time.
        arms: share of the full length at which layers are compared, and other methods.
        confirm_seeds: with how many seeds the chosen rank is confirmed, and ranks by layer are compared.
        targets: whether layers are compared.
        cut: whether the ranks of the ladder are one large adapter, cut, and not trained each at full length.
        neighbours: whether the ranks beside the chosen one are confirmed with it.
        nested: whether one adapter is trained at all ranks at once, beside the ladder.
        control: whether what is left of an adapter is checked against training at its ranks.
    """

    noise_seeds: int
    noise_share: float
    powers: tuple[int, ...]
    rungs: tuple[float, ...]
    arms: float
    confirm_seeds: int
    targets: bool = True
    cut: bool = False
    neighbours: bool = False
    nested: bool = False
    control: bool = False


_HALVED = (1 / 8, 1 / 4, 1.0)  # a short run prefers a higher rate than a long one: the last rung has the full length

BUDGETS = {
    "express": Budget(3, 1 / 4, (-2, -1, 0, 1, 2), (1 / 4,), 1 / 4, targets=False, cut=True, confirm_seeds=1),
    "standard": Budget(3, 1 / 4, (-2, -1, 0, 1, 2, 3), _HALVED, 1 / 4, confirm_seeds=3, control=True),
    "full": Budget(
        5,
        1 / 4,
        (-3, -2, -1, 0, 1, 2, 3, 4),
        _HALVED,
        1 / 2,
        confirm_seeds=5,
        neighbours=True,
        nested=True,
        control=True,
    ),
}
