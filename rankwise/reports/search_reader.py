"""A search's folder → Search.  Every problem of search.json is found before one error lists them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rankwise.errors import RunFolderError, listing
from rankwise.reports.reader import ROUNDING, SAME, SCHEMA, sentences
from rankwise.reports.run import Delta
from rankwise.reports.search import Confirmed, LadderPoint, Search

RESULT = "search.json"
_SEARCH = TypeAdapter(Search)


def read_search(folder: Path) -> Search:
    """Reads and checks what a search left behind.

    Raises:
        RunFolderError: lists all that is missing, malformed, or contradicts itself.
    """
    path = Path(folder).resolve() / RESULT
    problems, search = [f"{RESULT}: missing"], None
    if path.is_file():
        try:
            search = _SEARCH.validate_json(path.read_bytes(), strict=True)
            problems = [f"{RESULT}: {problem}" for problem in _contradictions(search)]
        except ValidationError as error:
            problems = sentences(RESULT, error)
    if search is None or problems:
        raise RunFolderError(
            f"{path.parent}: this search cannot be read:\n{listing(problems)}",
            hint="a search's folder is what `rankwise search --out` wrote",
        )
    return search


def _contradictions(search: Search) -> list[str]:
    """Where its figures disagree with each other: such a page would not be believed, and rightly."""
    problems = [] if search.schema == SCHEMA else [f"schema {search.schema}, this version reads {SCHEMA}"]
    problems += _unknown(search)
    for where, delta in _deltas(search):
        if not delta.low - ROUNDING <= delta.mean <= delta.high + ROUNDING:
            problems.append(f"{where} {delta.mean} lies outside {delta.low} … {delta.high}")
    if search.ladder is not None:
        problems += _unequal("ladder", search.ladder.best, search.ladder.points)
    if search.confirm is not None and search.ladder is not None:
        problems += _unequal("confirm", search.ladder.best, search.confirm.points)
    return problems


def _unknown(search: Search) -> Iterator[str]:
    """Choices that are none of what there was to choose from."""
    named: list[tuple[str, Any, Iterable[Any]]] = []
    if (rate := search.rate) is not None:
        named.append(("rate.best", rate.best, [lr for lr, *_ in rate.rungs[-1].learnt]))
    if (targets := search.targets) is not None:
        names = [point.targets for point in targets.points]
        named += [("targets.best", targets.best, names), ("targets.chosen", targets.chosen, names)]
    if (ladder := search.ladder) is not None:
        ranks = [point.rank for point in ladder.points if point.loss is not None]
        named += [("ladder.best", ladder.best, ranks), ("ladder.chosen", ladder.chosen, ranks)]
    if (cut := search.truncation) is not None and cut.chosen is not None:
        named.append(("truncation.chosen", cut.chosen, [point.rank for point in cut.points]))
    if (confirm := search.confirm) is not None:
        ranks = [point.rank for point in confirm.points]
        named.append(("confirm.chosen", confirm.chosen, ranks))
        if search.recommendation is not None:
            named.append(("recommendation.rank", search.recommendation.rank, ranks))
    for where, choice, known in named:
        if choice not in known:
            yield f"{where}: {choice} is none of {', '.join(map(str, known))}"


def _deltas(search: Search) -> Iterator[tuple[str, Delta]]:
    if search.noise is not None:
        yield "noise.gain", search.noise.gain
    rungs = search.rate.rungs if search.rate is not None else ()
    many: list[tuple[str, Sequence[Any]]] = [(f"rate.rungs.{n}", rung.points) for n, rung in enumerate(rungs)]
    for step in ("targets", "ladder", "truncation", "nested", "methods", "allocation", "confirm"):
        found = getattr(search, step)
        many.append((step, found.points if found is not None else ()))
    for where, points in many:
        yield from ((f"{where}.points.{n}.delta", point.delta) for n, point in enumerate(points) if point.delta)
    if (allocation := search.allocation) is not None:
        if allocation.against is not None:
            yield "allocation.against.uniform", allocation.against.uniform
            yield "allocation.against.shuffled", allocation.against.shuffled
        if allocation.confirmed is not None:
            yield "allocation.confirmed", allocation.confirmed
    if search.ship is not None and search.ship.control is not None and search.ship.control.delta is not None:
        yield "ship.control.delta", search.ship.control.delta
    for number, point in enumerate(search.confirm.points if search.confirm is not None else ()):
        yield f"confirm.points.{number}.gain", point.gain


def _unequal(step: str, best: int, points: Sequence[LadderPoint | Confirmed]) -> Iterator[str]:
    """Differences that are not those of the losses."""
    reference = next((point.loss for point in points if point.rank == best), None)
    for number, point in enumerate(points):
        if point.delta is None or point.loss is None or reference is None:
            continue
        if not math.isclose(point.delta.mean, point.loss - reference, rel_tol=SAME, abs_tol=SAME):
            yield f"{step}.points.{number}.delta {point.delta.mean} is not its loss − that of rank {best}"
