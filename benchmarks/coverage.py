"""How often the intervals of `search/statistics.py` hold the truth, in worlds whose truth is known.

    python benchmarks/coverage.py [--worlds 4000]

Two candidates with S seeds on n documents of unequal length.  A document's difference has a part of its own, a part of
the seed, a part of both, and the true difference; each is drawn anew in every world, heavy-tailed where it is of a
document.  `common` worlds share seeds; in `lone` ones every candidate is trained once and the noise of seeds comes from
five trainings of another.  Prints one JSON object: the share of worlds whose 95 % interval holds the truth, and, where
the truth is no difference, of those in which one is seen.  The goals are 93 to 97 % and at most 5 %.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import numpy as np

from rankwise.search.statistics import Noise, difference

SEEDS, DOCUMENTS = (2, 3, 5), (30, 200, 1000)
SHARES = (0.0, 0.3, 1.0, 3.0)  # deviation of the seeds' part over that of the documents' mean
TRUTH = 0.01
GOAL = (0.93, 0.97)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=4000)
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
    print(
        json.dumps(
            {
                "what": "coverage of 95 % intervals",
                "worlds": arguments.worlds,
                "mean": float(np.mean(covered)),
                "least": min(covered),
                "most": max(covered),
                "within_goal": sum(GOAL[0] <= one <= GOAL[1] for one in covered),
                "false_alarms": 1 - float(np.mean(covered)),
                "of": len(covered),
                "every": found,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
