"""The one base of every group of settings: frozen, closed, and polite about mistakes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rankwise.errors import SpecError, listing, nearest


class Settings(BaseModel):
    """A frozen set of named values.  Unknown names and impossible values raise one `SpecError` that lists them all."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            known = list(type(self).model_fields)
            problems = [_sentence(problem, known) for problem in error.errors()]
            raise SpecError(f"{type(self).__name__} cannot be built:\n{listing(problems)}") from None


def _sentence(problem: Any, known: list[str]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{where!r} is not a setting{nearest(where, known)}"
    if problem["type"] == "missing":
        return f"{where!r} is missing"
    if not where:
        return problem["msg"].removeprefix("Value error, ")
    return f"{where} = {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}"
