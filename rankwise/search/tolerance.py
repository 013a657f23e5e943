"""How much worse something may be and still count as good enough."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rankwise.engine.paired import Difference
from rankwise.errors import DataError, SpecError

_SAID = re.compile(r"\s*(?P<number>[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(?P<percent>%?)\s*")


@dataclass(frozen=True)
class Tolerance:
    """Nats per judged item, or a share of what an adapter gains over its base: one of the two.

    Raises:
        SpecError: not more than nothing, or a share that is the whole gain or more.
    """

    amount: float | None = None
    share: float = 0.02

    def __post_init__(self) -> None:
        if self.amount is not None and not 0 < self.amount < math.inf:
            raise SpecError(f"a tolerance of {self.amount:g} nats, expected a number above 0, such as 0.003")
        if self.amount is None and not 0 < self.share < 1:
            raise SpecError(f"a tolerance of {self.share:.3g} of the gain, expected one between 0 and 1, such as 2 %")

    @classmethod
    def said(cls, text: str) -> Tolerance:
        """As a person writes it: `2%` of the gain, or `0.003` nats.

        Raises:
            SpecError: neither.
        """
        found = _SAID.fullmatch(text)
        try:
            number = float(found["number"]) if found else math.nan
        except ValueError:
            number = math.nan
        if found is None or math.isnan(number):
            raise SpecError(f"tolerance {text!r}", hint="a share of the gain, such as 2%, or nats, such as 0.003")
        return cls(share=number / 100) if found["percent"] else cls(amount=number)

    def nats(self, gain: Difference) -> float:
        """What that comes to, `gain` being the base's loss less the adapter's.

        Raises:
            DataError: a share of a gain that is not measurably more than nothing.
        """
        if self.amount is not None:
            return self.amount
        if gain.low <= 0:
            raise DataError(
                f"the adapter is not measurably better than its base on these documents (gain {gain.mean:.3g}, 95 % "
                f"{gain.low:.3g} … {gain.high:.3g} nats): a share of that says nothing",
                hint="give more documents, or the tolerance in nats, such as 0.003",
            )
        return self.share * gain.mean
