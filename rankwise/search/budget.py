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
        targets: share of the full length at which layers are compared; None does not compare them.
        ladder: whether each rank is trained, or one large one is cut.
        confirm_seeds: with how many seeds the chosen rank is confirmed, and ranks by layer are compared.
        control: whether what is left of an adapter is checked against training at its ranks.
    """

    noise_seeds: int
    noise_share: float
    powers: tuple[int, ...]
    rungs: tuple[float, ...]
    targets: float | None
    ladder: bool
    confirm_seeds: int
    control: bool


BUDGETS = {
    "express": Budget(3, 1 / 4, (-2, -1, 0, 1, 2), (1 / 8, 1 / 4), None, ladder=False, confirm_seeds=1, control=False),
    "standard": Budget(
        3, 1 / 4, (-2, -1, 0, 1, 2, 3), (1 / 8, 1 / 4), 1 / 4, ladder=True, confirm_seeds=3, control=True
    ),
    "full": Budget(
        5, 1 / 4, (-3, -2, -1, 0, 1, 2, 3, 4), (1 / 8, 1 / 4, 1 / 2), 1 / 2, ladder=True, confirm_seeds=5, control=True
    ),
}
