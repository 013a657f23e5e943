"""A run's folder → Run.  Every problem of every file is found before one error lists them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from rankwise.errors import RunFolderError, listing
from rankwise.reports.folder import EVALUATION, METRICS, RECORD, SAMPLES
from rankwise.reports.run import Curve, Evaluation, Event, PerDocument, Record, Run, Sample, Step, Validation

SCHEMA = 1

# Per-document sums and the mean loss come from the same pass; they differ by the rounding of float32 sums at most.
SAME = 1e-3

# Where all documents move alike, the interval is one point, and sums taken in another order miss it by a hair.
ROUNDING = 1e-6

T = TypeVar("T")
Line = Step | Validation | Event
_LINES: dict[str, TypeAdapter[Any]] = {
    "step": TypeAdapter(Step),
    "evaluation": TypeAdapter(Validation),
    "event": TypeAdapter(Event),
}
_RECORD = TypeAdapter(Record)
_EVALUATION = TypeAdapter(Evaluation)
_SAMPLES = TypeAdapter(tuple[Sample, ...])


def read_run(folder: Path) -> Run:
    """Reads and checks everything a run left behind.

    Raises:
        RunFolderError: lists all that is missing, malformed, or contradicts itself.
    """
    folder = Path(folder).resolve()
    problems: list[str] = []
    record = _read_record(folder, problems)
    lines = _read_metrics(folder, problems)
    evaluation = _read_json(folder / EVALUATION, _EVALUATION, problems)
    samples = _read_json(folder / SAMPLES, _SAMPLES, problems)
    if evaluation is not None:
        problems += _contradictions(evaluation)
    if problems or record is None:
        raise RunFolderError(
            f"{folder}: this run cannot be read:\n{listing(problems)}",
            hint="a run's folder is what `rankwise train --out` wrote; evaluation.json comes with two or more "
            "validation documents",
        )
    events = tuple(line for line in lines if isinstance(line, Event))
    return Run(folder, record, _curves(lines), events, evaluation, samples or ())


def _read_record(folder: Path, problems: list[str]) -> Record | None:
    path = folder / RECORD
    if not path.is_file():
        problems.append(f"{RECORD}: missing")
        return None
    record = _read_json(path, _RECORD, problems)
    if record is not None and record.schema != SCHEMA:
        problems.append(f"{RECORD}: schema {record.schema}, this version reads {SCHEMA}")
    return record


def _read_json(path: Path, shape: TypeAdapter[T], problems: list[str]) -> T | None:
    if not path.is_file():
        return None
    try:
        return shape.validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        problems += sentences(path.name, error)
        return None


def _read_metrics(folder: Path, problems: list[str]) -> list[Line]:
    path = folder / METRICS
    if not path.is_file():
        return []
    lines: list[Line] = []
    *whole, rest = path.read_bytes().split(b"\n")
    for number, raw in enumerate([*whole, rest], start=1):
        if not raw.strip():
            continue
        try:
            lines.append(_line(json.loads(raw)))
        except ValidationError as error:
            problems += sentences(f"{METRICS}:{number}", error)
        except ValueError as error:
            # A crash may cut the last line, which then has no end; anywhere else a broken line is damage.
            if number <= len(whole):
                problems.append(f"{METRICS}:{number}: {error}")
    return lines


def _line(values: Any) -> Line:
    if not isinstance(values, dict):
        raise ValueError("not an object")
    kind = values.pop("kind", None)
    if kind not in _LINES:
        raise ValueError(f"kind {kind!r} is none of {', '.join(_LINES)}")
    if kind == "event":
        named = {key: values.pop(key) for key in ("step", "what") if key in values}
        values = {**named, "details": values}
    # Back through JSON, because strict dataclasses are built from JSON only; strict is what keeps "3" from being 3.
    line: Line = _LINES[kind].validate_json(json.dumps(values), strict=True)
    return line


def _curves(lines: Iterable[Line]) -> dict[str, Curve]:
    # A resumed run repeats the steps after its checkpoint: the last word on a step counts.
    steps: dict[str, dict[int, Step]] = {}
    validations: dict[str, dict[int, Validation]] = {}
    for line in lines:
        if isinstance(line, Step):
            steps.setdefault(line.adapter, {})[line.step] = line
        elif isinstance(line, Validation):
            validations.setdefault(line.adapter, {})[line.step] = line
    return {
        name: Curve(
            tuple(step for _, step in sorted(steps.get(name, {}).items())),
            tuple(look for _, look in sorted(validations.get(name, {}).items())),
        )
        for name in steps | validations
    }


def _contradictions(evaluation: Evaluation) -> list[str]:
    """Where the figures of an evaluation disagree with each other: such a page would not be believed, and rightly."""
    problems = []
    for adapter in evaluation.adapters:
        delta = adapter.delta
        if not delta.low - ROUNDING <= delta.mean <= delta.high + ROUNDING:
            problems.append(f"{adapter.name}: delta {delta.mean} lies outside {delta.low} … {delta.high}")
        if not _close(delta.mean, adapter.loss - evaluation.base.loss):
            problems.append(f"{adapter.name}: delta {delta.mean} is not its loss − base loss")
    if evaluation.per_document is not None:
        problems += _disagreements(evaluation, evaluation.per_document)
    return [f"{EVALUATION}: {problem}" for problem in problems]


def _disagreements(evaluation: Evaluation, detail: PerDocument) -> list[str]:
    """Where the documents do not add up to the totals."""
    problems = []
    if (documents := len(detail.tokens)) != evaluation.documents:
        problems.append(f"per_document holds {documents} documents, 'documents' says {evaluation.documents}")
    if (tokens := sum(detail.tokens)) != evaluation.tokens:
        problems.append(f"per_document holds {tokens} tokens, 'tokens' says {evaluation.tokens}")
    losses = {adapter.name: adapter.loss for adapter in evaluation.adapters}
    if detail.adapters.keys() != losses.keys():
        problems.append(f"per_document names {sorted(detail.adapters)}, adapters are {sorted(losses)}")
    sums = [("base", detail.base, evaluation.base.loss)]
    sums += [(f"adapters.{name}", detail.adapters[name], losses[name]) for name in detail.adapters if name in losses]
    for where, nats, loss in sums:
        if len(nats) != documents:
            problems.append(f"per_document.{where} has {len(nats)} sums for {documents} documents")
        elif tokens and not _close(sum(nats) / tokens, loss):
            problems.append(f"per_document.{where} gives {sum(nats) / tokens:.6g} nats/token, its loss is {loss:.6g}")
    return problems


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=SAME, abs_tol=SAME)


def sentences(where: str, error: ValidationError) -> list[str]:
    """One for each value that is missing or malformed."""
    return [
        ": ".join(part for part in (where, ".".join(map(str, problem["loc"])), problem["msg"]) if part)
        for problem in error.errors(include_url=False)
    ]
