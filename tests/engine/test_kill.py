"""A run that is killed at any moment and resumed ends with the very bits of one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = '''
"""Trains in a child that is killed again and again; the parent has done the slow imports once for all of them."""
import os, random, signal, sys, time
from pathlib import Path

from safetensors.torch import save_file

from rankwise.engine.folder import RunFolder, held_folder
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Pruning, Run
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus, random_labelled
from tests.grid import spec
from tests.models import tiny

LENGTHS = [7, 9, 5, 12, 3, 20] * 3
TASK = dict(enumerate(sys.argv)).get(2)
KIND, WHOLE, NEW = {None: (random_corpus, "norm", (97, 98))}.get(TASK, (random_labelled, "classifier", ()))
CORPUS, VALID = KIND(LENGTHS), KIND([9, 9, 4], seed=5)
RUNS = {"a": Run(lr=5e-3), "b": Run(lr=1e-3, schedule="constant"), "c": Run(lr=2e-3, pruning=Pruning(every=2))}


def run(out, keep):
    loop, resume = Loop(batch_tokens=40, epochs=2, evaluate_every=3, save_every=1, keep=keep), RunFolder(out).begun
    with held_folder(out, resume=resume) as folder, Bank(tiny("bert" if TASK else "llama", task=TASK)) as bank:
        bank.add("a", spec("all-linear", dropout=0.2, modules_to_save=(WHOLE,), new_tokens=NEW))
        bank.add("b", spec("minimal", rank=1))
        bank.add("c", spec("attention", form="adalora", rank=5))
        train(bank, RUNS, CORPUS, valid=VALID, loop=loop, out=folder, resume=resume)
        tensors = {f"{n}/{p}": t.detach().clone() for n in bank.names for p, t in bank.named_parameters(n)}
        save_file(tensors, out.with_suffix(".safetensors"))


def killed(out, keep, seconds):
    """Whether the child was killed; it is given so many seconds, or (None) as many as it wants."""
    child = os.fork()
    if not child:
        run(out, keep)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"the child ended with {status}")
    return status == signal.SIGKILL


place, chance = Path(sys.argv[1]), random.Random(0)
for keep in (2,) if TASK else (1, 2):
    begun = time.perf_counter()
    killed(place / f"whole-{keep}", keep, None)
    seconds, kills = time.perf_counter() - begun, 0
    while kills < 4 and killed(place / f"cut-{keep}", keep, chance.uniform(0.02, 0.3 * seconds)):
        kills += 1
    killed(place / f"cut-{keep}", keep, None)
    print(kills)
'''


@pytest.mark.parametrize("task", [(), ("sequence-classification",)], ids=["causal-lm", "sequence-classification"])
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(tmp_path, task):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path, *task],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert sum(int(kills) for kills in done.stdout.split()) >= 3, "hardly ever killed: nothing was tried"
    for keep in (2,) if task else (1, 2):
        whole, cut = tmp_path / f"whole-{keep}", tmp_path / f"cut-{keep}"
        want, found = (load_file(folder.with_suffix(".safetensors")) for folder in (whole, cut))
        assert want.keys() == found.keys()
        assert [name for name in want if not torch.equal(want[name], found[name])] == []
        assert told(cut) == told(whole)
        assert len(list((cut / "checkpoints").iterdir())) == keep


def told(folder: Path) -> list[dict]:
    """What was measured; each step once, however often the run was cut off and its lines taken back."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in event.items() if k != "seconds"} for event in events if event["kind"] != "event"]
