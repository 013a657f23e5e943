"""Ways of training on for a new task, and what each forgets of the old one.

    python benchmarks/continual.py --model DIR --old OLD.jsonl --old-test OLD_TEST.jsonl --new NEW.jsonl \
        --new-test NEW_TEST.jsonl [--documents 200] [--test 150] [--rank 8] [--lr 2e-4] [--share 0.2] [--seeds 1]

An adapter A learns the old task.  Then the new one is learnt in so many ways, each from the same documents under the
same settings: `continue` trains A further, with a fresh optimiser; `keep` the same with A's optimiser; `onto` trains a
new adapter with A merged beneath and adds the two up; `replay` trains A further with old documents mixed in, a share of
them, in as many steps as these take; `fresh` is a new adapter on the bare base, and `beside` that one and A in a mix of
1 and 1, which takes no training.  Prints one JSON object: losses of each on unseen documents of both tasks, in nats per
supervised token, and paired 95 % intervals of forgetting (against A, on the old task) and of what was gained (against
`fresh`, on the new one).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from where import machine

from rankwise.adapters.spec import LoraSpec
from rankwise.data.prepare import prepare
from rankwise.data.replay import Replay
from rankwise.data.template import Template
from rankwise.engine.evaluate import measured
from rankwise.engine.folder import held_folder
from rankwise.engine.loop import train
from rankwise.engine.paired import paired_difference
from rankwise.engine.run import Loop, Run
from rankwise.frozen.load import load_base
from rankwise.surgery.bank import Bank
from rankwise.surgery.beneath import Beneath

WAYS = ("continue", "keep", "onto", "replay", "fresh")


class Course:
    """One seed: the old task first, then the new one in every way."""

    def __init__(self, bank: Bank, data: dict[str, Any], arguments: argparse.Namespace, seed: int, place: Path) -> None:
        self.bank, self.data, self.arguments, self.seed, self.place = bank, data, arguments, seed, place
        self.spec = LoraSpec(rank=arguments.rank, alpha=2 * arguments.rank, targets="all-linear")
        self.spent: dict[str, dict[str, float]] = {}

    def learn(self, name: str, corpus: Any, replay: Replay | None = None, moments: Path | None = None) -> None:
        began = time.perf_counter()
        loop = Loop(batch_documents=self.arguments.batch, seed=self.seed, replay=replay)
        run = Run(lr=self.arguments.lr, moments=moments)
        with held_folder(self.place / name, resume=False) as folder:
            outcome = train(self.bank, {name: run}, corpus, loop=loop, out=folder)[name]
        self.spent[name] = {"seconds": round(time.perf_counter() - began, 1), "steps": outcome.steps}
        print(name, self.spent[name], file=sys.stderr, flush=True)

    def go(self) -> None:
        bank, new = self.bank, self.data["new"]
        bank.add("A", self.spec, self.seed)
        self.learn("A", self.data["old"])
        for name in WAYS:
            beneath = None
            if name == "fresh":
                bank.add(name, self.spec, self.seed + 1)
            elif name == "onto":
                bank.put("copy", bank.adapter("A"))
                others = self._set_aside()
                beneath = Beneath(bank, "copy")
                bank.add(name, self.spec, self.seed + 1)
            else:
                bank.put(name, bank.adapter("A"), self.seed + 1)
            old = self.data["replay"] if name == "replay" else (new, None)
            self.learn(name, *old, moments=self.place / "A" if name == "keep" else None)
            if beneath is not None:
                made = beneath.joined(bank.adapter(name)).adapter
                bank.remove(name)
                beneath.lift()
                for other, adapter in {**others, name: made}.items():
                    bank.put(other, adapter)

    def _set_aside(self) -> dict[str, Any]:
        """All adapters but the copy: nothing may stand on a base that has something merged beneath."""
        import copy

        aside = {name: copy.deepcopy(self.bank.adapter(name)) for name in self.bank.names if name != "copy"}
        for name in aside:
            self.bank.remove(name)
        return aside

    def judged(self) -> dict[str, Any]:
        ways = {"base": None, "A": "A", **{name: name for name in WAYS}, "beside": self.bank.mix({"A": 1, "fresh": 1})}
        found: dict[str, Any] = {name: {**self.spent.get(name, {})} for name in ways}
        for task, against in (("old", "A"), ("new", "fresh")):
            examples = self.data[f"{task} test"]
            rows = dict(zip(ways, measured(self.bank, list(ways.values()), examples)[0], strict=True))
            tokens = examples.supervised_counts()
            for name, row in rows.items():
                gap = paired_difference(row, rows[against], tokens)
                found[name][task] = round(float(row.sum() / tokens.sum()), 4)
                found[name][f"{task} against {against}"] = [round(one, 4) for one in (gap.mean, gap.low, gap.high)]
        return found


def documents(arguments: argparse.Namespace, template: Template) -> dict[str, Any]:
    def read(*files: str) -> Any:
        return prepare(files, template, arguments.tokens).corpus

    count = arguments.documents
    both = read(arguments.new, arguments.old)
    source = both.origins[:, 0]
    parts = [np.flatnonzero(source == number)[:count] for number in (0, 1)]
    found = {"new": both.subset(parts[0]), "old": both.subset(parts[1])}
    found["replay"] = (both.subset(np.concatenate(parts)), Replay(documents=len(parts[1]), share=arguments.share))
    for task, file in (("old", arguments.old_test), ("new", arguments.new_test)):
        test = read(file)
        found[f"{task} test"] = test.subset(np.arange(min(arguments.test, len(test))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "old", "old-test", "new", "new-test"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("documents", 200), ("test", 150), ("rank", 8), ("batch", 8), ("tokens", 512), ("seeds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--share", type=float, default=0.2)
    arguments = parser.parse_args()
    base = load_base(arguments.model)
    data = documents(arguments, Template(base.tokenizer))
    began, seeds = time.perf_counter(), []
    for seed in range(arguments.seeds):
        with Bank(base.model) as bank, tempfile.TemporaryDirectory() as place:
            course = Course(bank, data, arguments, seed, Path(place))
            course.go()
            seeds.append(course.judged())
    told = {
        "model": Path(arguments.model).name,
        "tasks": {task: Path(getattr(arguments, task)).parent.name for task in ("old", "new")},
        "documents": {name: len(data[name]) for name in ("old", "new", "old test", "new test")},
        "settings": {name: getattr(arguments, name) for name in ("rank", "batch", "lr", "share")},
        "seeds": seeds,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine(),
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
