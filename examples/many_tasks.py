"""Many tasks, one base: an adapter for each, trained here, then switched request by request and mixed.

    python examples/many_tasks.py --model PATH_OR_ID notes=notes.jsonl labels=labels.jsonl … [--out DIR]

Each file has rows of one task (chats, or prompts and completions).  The base is loaded once and stays as it is; a task
costs an adapter of some megabytes.  Documents that were held back say what each adapter is worth on each task; then one
batch holds a request of every task, each row through its own adapter, and at last one request goes through two adapters
in a weighted sum.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import rankwise as rw


def requests(corpora: Mapping[str, rw.Corpus]) -> list[list[int]]:
    """The first held-back document of each task, up to where its answer begins, in tokens."""
    found = []
    for corpus in corpora.values():
        tokens, supervised = corpus.document(0)
        found.append(tokens[: int(supervised.argmax())].tolist())
    return found


@torch.no_grad()
def answers(model: Any, prompts: Sequence[list[int]], stop: int, most: int = 32) -> list[list[int]]:
    """The likeliest tokens after each prompt, all in one batch, through whatever route is in force."""
    width = max(map(len, prompts))
    rows = torch.tensor([[stop] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    out = model.generate(
        input_ids=rows, attention_mask=mask, max_new_tokens=most, do_sample=False, eos_token_id=stop, pad_token_id=stop
    )
    return [[token for token in row if token != stop] for row in out[:, width:].tolist()]


def main(
    model: str, files: Mapping[str, str], out: Path, documents: int = 200, epochs: float = 2, **loading: Any
) -> dict[str, dict[str, float]]:
    base = rw.load_base(model, **loading)
    template = rw.Template(base.tokenizer)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    learnt, unseen = {}, {}
    for name, file in files.items():
        corpus = rw.prepare(file, template, max_length=1024).corpus
        learnt[name], unseen[name] = rw.split(corpus.subset(range(min(documents, len(corpus)))), share=0.2)

    with rw.Bank(base.model) as bank:
        for name, corpus in learnt.items():
            bank.add(name, rw.LoraSpec(rank=8, alpha=16, targets="all-linear"))
            rw.train(bank, {name: rw.Run(lr=1e-3)}, corpus, loop=rw.Loop(epochs=epochs, batch_documents=4))
            bank.save(name, out / name)
            size = sum(path.stat().st_size for path in (out / name).glob("*.safetensors"))
            print(f"{name}: an adapter of {size / 1e6:.1f} MB beside one base")

    with rw.Bank(base.model) as bank:  # another day: adapters are loaded, the base has never changed
        for name in files:
            bank.load(name, out / name)
        losses: dict[str, dict[str, float]] = {}
        print(f"loss on held-back documents  {'base':>10}" + "".join(f"{name[:10]:>11}" for name in files))
        for task, corpus in unseen.items():
            said = rw.evaluate(bank, list(files), corpus).summary()
            losses[task] = {"base": said["base"]["loss"], **{one["name"]: one["loss"] for one in said["adapters"]}}
            print(f"  of {task:<24}  " + " ".join(f"{loss:10.3f}" for loss in losses[task].values()))

        prompts, stop = requests(unseen), template.stops[0]
        with bank.route(list(files)):  # row by row: each request through its own adapter
            together = answers(base.model, prompts, stop)
        for name, prompt, answer in zip(files, prompts, together, strict=True):
            with bank.use(name):
                alone = answers(base.model, [prompt], stop)[0]
            agrees = "as alone" if alone == answer else "alone it rounds otherwise"
            print(f"{name}: {base.tokenizer.decode(answer, skip_special_tokens=True)!r} ({agrees})")

        first, second = list(files)[:2]
        with bank.use(bank.mix({first: 0.7, second: 0.3})):
            mixed = answers(base.model, prompts[:1], stop)[0]
        told = base.tokenizer.decode(mixed, skip_special_tokens=True)
        print(f"0.7 · {first} + 0.3 · {second}: {told!r}")

    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    print("the base is what it was, to the bit")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="NAME=FILE", help="two or more")
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    named = dict(task.partition("=")[::2] for task in asked.tasks)
    if len(named) < 2 or not all(named.values()):
        parser.error("give two tasks or more, each as NAME=FILE")
    with tempfile.TemporaryDirectory() as temporary:
        main(asked.model, named, asked.out or Path(temporary), asked.documents)
