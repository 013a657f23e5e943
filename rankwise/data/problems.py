"""Everything that is wrong with the rows, gathered so that it can be said at once."""

from __future__ import annotations

from rankwise.errors import DataError, listing

_SHOWN = 20


class Problems:
    """A list that every reader adds to, and one `DataError` at the end of it.

    Only the first twenty are kept whole; the rest are counted, so a million bad rows cost no memory.
    """

    def __init__(self) -> None:
        self._first: list[str] = []
        self._count = 0
        self._hint = ""

    def __len__(self) -> int:
        return self._count

    def add(self, where: object, what: str, *, hint: str = "") -> None:
        """`where` is the origin (`file:line`), `what` says what was found and what was expected."""
        self._count += 1
        if len(self._first) < _SHOWN:
            self._first.append(f"{where}: {what}")
            self._hint = self._hint or hint

    def check(self) -> None:
        """Nothing, when nothing was added.

        Raises:
            DataError: lists up to twenty problems and counts the others; its hint is the first one given.
        """
        if not self._count:
            return
        rest = [f"  … and {self._count - len(self._first):,} more"] if self._count > len(self._first) else []
        noun = "problem" if self._count == 1 else "problems"
        raise DataError(
            "\n".join([f"{self._count:,} {noun} in the data:", listing(self._first), *rest]),
            hint=self._hint or "correct these rows or take them out, then run again",
        )
