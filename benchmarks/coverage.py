"""How often the intervals of `search/statistics.py` hold the truth: in worlds whose truth is known, and in A/A runs.

    python benchmarks/coverage.py [--worlds 4000] [--model DIR --data DIR [--trainings 24]]

Two candidates with S seeds on n documents of unequal length.  A document's difference has a part of its own, a part of
the seed, a part of both, and the true difference; each is drawn anew in every world, heavy-tailed where it is of a
document.  `common` worlds share seeds; in `lone` ones every candidate is trained once and the noise of seeds comes from
five trainings of another.

With a model and a folder of train.jsonl and test.jsonl of labelled texts, one adapter is trained with so many seeds,
and groups of these trainings, drawn again and again, are held against each other: between them is no difference.

Prints one JSON object: the share of 95 % intervals that hold the truth, and of A/A comparisons in which one side is
called better.  The goals are 93 to 97 % and at most 5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from where import machine

from rankwise.search.statistics import Noise, difference

SEEDS, DOCUMENTS = (2, 3, 5), (30, 200, 1000)
SHARES = (0.0, 0.3, 1.0, 3.0)  # deviation of the seeds' part over that of the documents' mean
TRUTH = 0.01
GOAL = (0.93, 0.97)
DRAWS = 2000
DOCUMENTS_OF_AA = 300  # to learn from; all of the test file is judged


def world(chance: np.random.Generator, seeds: int, documents: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Differences of a candidate from nothing, `[S, n]`, summed, and judged items `[n]`."""
    items = chance.integers(5, 80, size=documents)
    of_document = chance.standard_t(5, size=documents) * 0.1
    of_both = chance.normal(size=(seeds, documents)) * 0.05
    of_seed = chance.normal(size=(seeds, 1)) * share * 0.1 / math.sqrt(documents)
    return (TRUTH + of_document + of_both + of_seed) * items, items


def held(chance: np.random.Generator, seeds: int, documents: int, share: float) -> bool:
    apart, items = world(chance, seeds, documents, share)
    low, high = difference(apart, np.zeros_like(apart), items).interval()
    return low <= TRUTH <= high


def held_alone(chance: np.random.Generator, documents: int, share: float) -> bool:
    """Each candidate trained once; what seeds do is known of five trainings on the same documents."""
    apart, items = world(chance, 1, documents, 0.0)
    deviation = share * 0.1 / math.sqrt(documents)
    apart = apart + items * deviation * (chance.normal() - chance.normal())
    noise = Noise.of(chance.normal(size=(5, 1)) * deviation * items, items)
    low, high = difference(apart, np.zeros_like(apart), items, noise).interval()
    return low <= TRUTH <= high


def trainings(arguments: argparse.Namespace, place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses `[trainings, n]` of one configuration with as many seeds, and judged items `[n]`."""
    from rankwise.jobs.request import TrainRequest
    from rankwise.jobs.search import SearchRequest, opened
    from rankwise.jobs.watch import Quiet

    rows = (arguments.data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few = place / "train.jsonl"
    few.write_text("".join(rows[:DOCUMENTS_OF_AA]), encoding="utf-8")
    test = str(arguments.data / "test.jsonl")  # halves of it choose and confirm; both are judged
    files: dict[str, Any] = {"data": (str(few),), "valid": test}
    request = TrainRequest(
        model=arguments.model, task="sequence-classification", out=place / "aa", lr=1e-3, rank=8, epochs=2, **files
    )
    (place / "aa").mkdir()
    with opened(SearchRequest(), request, Quiet()) as (advisor, _, _):
        (row,) = advisor.trials.confirmed("noise", [advisor.candidate()], range(arguments.trainings))
        items = np.concatenate([advisor.trials.items(which) for which in ("choose", "confirm")])
    learnt = [one for one in row if one.choose is not None and one.confirm is not None]
    return np.stack([np.concatenate([one.choose, one.confirm]) for one in learnt]), items  # type: ignore[list-item]


def compared_with_itself(losses: np.ndarray, items: np.ndarray, chance: np.random.Generator) -> list[dict[str, Any]]:
    """Groups of trainings of one configuration against each other, on documents that are drawn anew each time."""
    found = []
    for seeds in ("lone", *SEEDS):
        size, held, better = (1 if seeds == "lone" else int(seeds)), 0, 0
        for _ in range(DRAWS):
            order = chance.permutation(len(losses))
            drawn = chance.integers(len(items), size=len(items))
            first, second = losses[order[:size]][:, drawn], losses[order[size : 2 * size]][:, drawn]
            noise = Noise.of(losses[order[2:7]][:, drawn], items[drawn]) if seeds == "lone" else None
            low, high = difference(first, second, items[drawn], noise).interval()
            held += low <= 0 <= high
            better += high < 0
        found.append({"seeds": seeds, "held": held / DRAWS, "called_better": better / DRAWS})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=4000)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--trainings", type=int, default=24)
    arguments = parser.parse_args()
    chance = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for share in SHARES:
        for documents in DOCUMENTS:
            for seeds in SEEDS:
                share_held = np.mean([held(chance, seeds, documents, share) for _ in range(arguments.worlds)])
                found.append({"seeds": seeds, "documents": documents, "share": share, "held": float(share_held)})
            alone = np.mean([held_alone(chance, documents, share) for _ in range(arguments.worlds)])
            found.append({"seeds": "lone", "documents": documents, "share": share, "held": float(alone)})
    covered = [one["held"] for one in found]
    told: dict[str, Any] = {
        "what": "coverage of 95 % intervals",
        "machine": machine(),
        "worlds": arguments.worlds,
        "mean": float(np.mean(covered)),
        "least": min(covered),
        "most": max(covered),
        "within_goal": sum(GOAL[0] <= one <= GOAL[1] for one in covered),
        "of": len(covered),
    }
    if arguments.model:
        with tempfile.TemporaryDirectory() as place:
            losses, items = trainings(arguments, Path(place))
        told["a_a"] = {
            "model": Path(arguments.model).name,
            "data": arguments.data.name,
            "trainings": len(losses),
            "documents": len(items),
            "deviation": Noise.of(losses, items).variance ** 0.5,
            "every": compared_with_itself(losses, items, chance),
        }
    print(json.dumps(told | {"every": found}, indent=2))


if __name__ == "__main__":
    main()
