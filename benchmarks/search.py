"""`rankwise search` against an exhaustive grid on the same base and documents.

    python benchmarks/search.py --model DIR --task sequence-classification --data DIR [--data DIR …] [--documents 600]

Each DIR holds train.jsonl, valid.jsonl and test.jsonl.  For each: (1) the search, up to its recommendation; (2) one
run of the grid's middle by PEFT and transformers' Trainer with the validation loss at its end, in each number format
that the machine multiplies, of which the faster one times a grid that is run one by one; (3) the grid, every rate ×
every rank at full length with one seed, through the same engine, of which the search knows nothing; (4) the adapter of
the grid's best rate at rank 32, made smaller by `compress` on documents that nobody has used so far.

The regret is the loss of what was recommended less that of what the grid would have recommended, its lowest loss on the
validation documents, measured on the test documents, which neither looked at.  `hindsight` is the same against the
lowest of all runs on these very test documents: an oracle, whose luck counts against the search.  `--only time` leaves
out the grid, for a machine that is quiet for minutes only; `--only regret` PEFT, for one that is not; `--only compress`
does (4) alone, of one run at `--lr`, which should be the grid's best.  `--record` takes from an earlier record of the
same settings what the grid would have recommended and what was best in hindsight, and trains these two alone again: a
search that has changed is judged without its grid.  Where the grid's choice and the search's differ, both are then
trained with two more seeds (`regret_with_seeds`): one run of each says also which was luckier.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from where import machine

RANKS = (2, 4, 8, 16, 32, 64)
POWERS = (-2, -1, 0, 1, 2, 3)
ALPHA, RANK, LARGE, LENGTH = 32, 16, 32, 256
SPARE = 1000  # documents for `compress`
SEEDS = 3
SETTINGS = ("documents", "judged", "epochs", "lr", "batch", "dtype")

Cell = tuple[float, int]  # of a grid: learning rate and rank


def request(arguments: argparse.Namespace, data: Path, out: Path, *, spare: bool = False) -> Any:
    """What is searched in; with `spare`, documents behind what is learnt from take the place of the valid ones."""
    from rankwise.jobs.request import TrainRequest

    files = {}
    for part, most in (("train", arguments.documents), ("valid", arguments.judged), ("test", arguments.judged)):
        first = arguments.documents if spare and part == "valid" else 0
        source = data / ("train.jsonl" if first else f"{part}.jsonl")
        rows = source.read_text(encoding="utf-8").splitlines(keepends=True)[first:][: SPARE if first else most]
        place = out.parent / f"{out.name}-{part}.jsonl"
        place.write_text("".join(rows), encoding="utf-8")
        files[part] = str(place)
    settings = {"alpha": ALPHA, "rank": RANK, "lr": arguments.lr, "max_length": LENGTH, "epochs": arguments.epochs}
    settings |= {"batch_documents": arguments.batch, "dtype": arguments.dtype}
    judged = {"valid": files["valid"], "test": files["test"]}
    return TrainRequest(
        model=arguments.model, task=arguments.task, data=(files["train"],), out=out, **judged, **settings
    )


def compare(arguments: argparse.Namespace, data: Path, place: Path, grids: Path | None) -> dict[str, Any]:
    from rankwise.jobs.search import SearchRequest, run_search
    from rankwise.jobs.watch import Quiet

    place.mkdir(parents=True)
    if arguments.only == "compress":
        return {"data": data.name, "compress": _large_cut(arguments, data, place / "large")}
    asked = SearchRequest(budget=arguments.budget, ranks=RANKS, allocate=arguments.allocate, until="confirm")
    began = time.perf_counter()
    found = run_search(asked, request(arguments, data, place / "search"), Quiet())
    seconds = time.perf_counter() - began
    told = found["recommendation"]
    answer = {
        "data": data.name,
        "recommendation": {key: told[key] for key in ("kind", "rank", "lr", "targets", "sentence")},
        "runs": found["cost"]["runs"],
        "noise": {key: found["noise"][key] for key in ("deviation", "detectable", "tolerance")},
        **{key: found.get(key) for key in ("truncation", "nested", "allocation")},
    }
    if arguments.only != "regret":
        peft = {dtype: _peft(arguments, data, dtype) for dtype in ("float32", "bfloat16")}
        one_by_one = min(peft.values()) * len(RANKS) * len(POWERS)
        alone = _alone(arguments, data, place / "alone")
        answer["seconds"] = {"search": seconds, "one run": alone, "one run, PEFT": peft, "grid, PEFT": one_by_one}
        answer |= {"ratio_to_grid": seconds / one_by_one, "ratio_to_one_run": seconds / alone}
        print(json.dumps(answer), file=sys.stderr, flush=True)  # the grid may take hours
    if arguments.only != "time":
        against = _against_grid if arguments.record is None else _against_record
        answer |= against(arguments, data, (grids or place) / f"grid-{data.name}", told)
    return answer


def _alone(arguments: argparse.Namespace, data: Path, out: Path) -> float:
    """Seconds of one run of full length, judged like those of the search."""
    from rankwise.jobs.search import SearchRequest, opened
    from rankwise.jobs.watch import Quiet

    out.mkdir()
    with opened(SearchRequest(), request(arguments, data, out), Quiet()) as (advisor, _, _):
        began = time.perf_counter()
        advisor.trials.made("grid", [advisor.candidate()], [0], 1.0)
        return time.perf_counter() - began


def _against_grid(arguments: argparse.Namespace, data: Path, out: Path, told: dict[str, Any]) -> dict[str, Any]:
    """The grid, what it would have recommended, and how far from that the search's recommendation `told` is."""
    from rankwise.jobs.search import SearchRequest, opened
    from rankwise.jobs.watch import Quiet
    from rankwise.search.rule import lowest

    out.mkdir(exist_ok=True)
    with opened(SearchRequest(ranks=RANKS), request(arguments, data, out), Quiet()) as (advisor, _, _):
        cells = [(arguments.lr * 2.0**power, rank) for power, rank in product(POWERS, RANKS)]
        candidates, chosen_by, losses = _trained(advisor, cells)
        means = [advisor.mean(one, "confirm") for one in losses]
        choice, best = lowest(chosen_by), lowest(means)
        of_large = [i for i, (_, rank) in enumerate(cells) if rank == LARGE]
        large = candidates[of_large[lowest([chosen_by[i] for i in of_large])]]
        with tempfile.TemporaryDirectory() as folder:
            smaller = cut(advisor, large, request(arguments, data, Path(folder), spare=True))
        return {
            **_apart(advisor, told, (cells[choice], losses[choice]), (cells[best], losses[best])),
            "compress": smaller,
            "grid": [
                {"lr": lr, "rank": rank, "chosen_by": first, "loss": loss}
                for (lr, rank), first, loss in zip(cells, chosen_by, means, strict=True)
            ],
        }


def _against_record(arguments: argparse.Namespace, data: Path, out: Path, told: dict[str, Any]) -> dict[str, Any]:
    """The same against the grid of a record, of which only what it points at is trained again."""
    from rankwise.jobs.search import SearchRequest, opened
    from rankwise.jobs.watch import Quiet

    record = json.loads(arguments.record.read_text(encoding="utf-8"))
    other = {name: record[name] for name in SETTINGS if record[name] != getattr(arguments, name)}
    earlier = next((one for one in record["every"] if one["data"] == data.name), None)
    if other or earlier is None:
        raise SystemExit(f"{arguments.record}: {other or data.name}: not what is asked for now")
    cells = [(earlier[key]["lr"], earlier[key]["rank"]) for key in ("choice_of_grid", "best_of_grid")]
    out.mkdir(exist_ok=True)
    with opened(SearchRequest(ranks=RANKS), request(arguments, data, out), Quiet()) as (advisor, _, _):
        _, _, losses = _trained(advisor, cells)
        found = _apart(advisor, told, *zip(cells, losses, strict=True))
        return found | {"regret_with_seeds": _with_seeds(advisor, told, cells[0]), "record": arguments.record.name}


def _trained(advisor: Any, cells: list[Cell]) -> tuple[list[Any], list[float], list[Any]]:
    """Candidates, what each loses on the documents to choose by, and losses on every document to confirm on."""
    candidates = [advisor.candidate(rank, lr) for lr, rank in cells]
    grid = advisor.trials.confirmed("grid", candidates, [0])
    return candidates, [advisor.mean(one) for one in advisor.losses(grid)], advisor.losses(grid, "confirm")


def _apart(advisor: Any, told: dict[str, Any], choice: tuple[Cell, Any], best: tuple[Cell, Any]) -> dict[str, Any]:
    """How far what the search recommended is from two cells of the grid, of which the losses are known."""
    own = advisor.trials.confirmed("grid", [_recommended(advisor, told)], [0])
    ours, items = advisor.losses(own, "confirm")[0], advisor.trials.items("confirm")
    gain = advisor.gain(choice[1], "confirm")["mean"]
    documents = {which: len(advisor.trials.items(which)) for which in ("choose", "confirm")}
    found: dict[str, Any] = {"documents": documents, "gain": gain}
    for name, how, ((lr, rank), losses) in (("choice", "regret", choice), ("best", "hindsight", best)):
        found[f"{name}_of_grid"] = {"lr": lr, "rank": rank, "loss": advisor.mean(losses, "confirm")}
        found[how] = _regret(ours, losses, items, gain)
    return found


def _recommended(advisor: Any, told: dict[str, Any]) -> Any:
    return advisor.candidate(told["rank"], told["lr"], told["targets"])


def _with_seeds(advisor: Any, told: dict[str, Any], choice: Cell) -> dict[str, Any] | None:
    """The regret once more, of `SEEDS` trainings each; None where both are one and the same."""
    (lr, rank), own = choice, _recommended(advisor, told)
    other = advisor.candidate(rank, lr)
    if own == other:
        return None
    found = advisor.trials.confirmed("grid", [own, other], range(SEEDS))
    ours, theirs = advisor.losses(found, "confirm")
    gain = advisor.gain(theirs, "confirm")["mean"]
    return {"seeds": SEEDS, **_regret(ours, theirs, advisor.trials.items("confirm"), gain)}


def _regret(ours: Any, theirs: Any, items: Any, gain: float) -> dict[str, Any]:
    from rankwise.search.statistics import difference

    apart = difference(ours, theirs, items)
    allowed = max(apart.error, 0.02 * gain)
    return {"mean": apart.mean, "error": apart.error, "allowed": allowed, "within": apart.mean <= allowed}


def cut(advisor: Any, candidate: Any, spare: Any) -> dict[str, Any]:
    """What `compress` leaves of a large adapter, judged on documents that neither it nor training has seen."""
    from rankwise.engine.evaluate import measured
    from rankwise.errors import DataError
    from rankwise.jobs.search import SearchRequest, opened
    from rankwise.jobs.watch import Quiet
    from rankwise.search.compression import compress

    with opened(SearchRequest(), spare, Quiet()) as (other, _, _):
        fresh = other.trials.documents
    trials = advisor.trials
    bank, items = trials.bank, trials.items("confirm").sum()
    bank.put("large", trials.adapter("grid", candidate, 0))
    try:
        found = compress(bank, "large", fresh.choose, frequencies=fresh.frequencies)
    except DataError as reason:
        return {"fewer": 0.0, "why": reason.message.splitlines()[0]}
    bank.put("small", found.adapter)
    large, small = (losses.sum() / items for losses in measured(bank, ["large", "small"], trials.documents.confirm)[0])
    for name in ("large", "small"):
        bank.remove(name)
    base = trials.base("confirm").sum() / items
    share = found.chosen.parameters / found.parameters
    told = {"rank": LARGE, "lr": candidate.run.lr, "documents": len(fresh.choose), "fewer": 1 - share}
    return told | {"gain_lost": float((small - large) / (base - large))}


def _large_cut(arguments: argparse.Namespace, data: Path, out: Path) -> dict[str, Any]:
    """`cut` without a grid: of one run at the rate that is asked for."""
    from rankwise.jobs.search import SearchRequest, opened
    from rankwise.jobs.watch import Quiet

    out.mkdir()
    with opened(SearchRequest(), request(arguments, data, out), Quiet()) as (advisor, _, _):
        large = advisor.candidate(LARGE, arguments.lr)
        advisor.trials.confirmed("grid", [large], [0])
        with tempfile.TemporaryDirectory() as folder:
            return cut(advisor, large, request(arguments, data, Path(folder), spare=True))


def _peft(arguments: argparse.Namespace, data: Path, dtype: str) -> float:
    """Seconds of one run."""
    asked = ["--peft", str(data), "--dtype", dtype, "--model", arguments.model, "--task", arguments.task]
    for name in ("documents", "judged", "epochs", "lr", "batch"):
        asked += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run([sys.executable, __file__, *asked], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def run_peft(arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """One run of the grid as people run it: as many documents a step, sorted by length into batches."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    of_texts = arguments.task == "sequence-classification"
    model, train, valid, collate = (_texts if of_texts else _chats)(arguments, data)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="SEQ_CLS" if of_texts else "CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch,
            num_train_epochs=arguments.epochs,
            learning_rate=arguments.lr,
            bf16=arguments.dtype == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            prediction_loss_only=True,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
        )
        trainer = transformers.Trainer(
            model=model, args=settings, train_dataset=train, eval_dataset=valid, data_collator=collate
        )
        began = time.perf_counter()
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        return {"seconds": time.perf_counter() - began, "loss": loss}


Peft = tuple[Any, list[dict[str, Any]], list[dict[str, Any]], Any]  # a model, examples of both parts, and a collator


def _texts(arguments: argparse.Namespace, data: Path) -> Peft:
    import torch
    import transformers

    parts = []
    for part, most in (("train", arguments.documents), ("valid", arguments.judged)):
        rows = (data / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()[:most]
        parts.append([json.loads(row) for row in rows])
    labels = sorted({row["label"] for row in parts[0]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    examples = [
        [
            {**found, "labels": labels.index(row["label"]), "length": len(found["input_ids"])}
            for row in part
            for found in [tokenizer(row["text"], truncation=True, max_length=LENGTH)]
        ]
        for part in parts
    ]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(labels), dtype=getattr(torch, arguments.dtype)
    )
    return model, *examples, transformers.DataCollatorWithPadding(tokenizer)


def _chats(arguments: argparse.Namespace, data: Path) -> Peft:
    """The very tokens that rankwise makes of the documents, and the very ones that it judges."""
    import torch
    import transformers
    from train_speed import padded_batch

    from rankwise.data.prepare import prepare
    from rankwise.data.template import Template

    template = Template(transformers.AutoTokenizer.from_pretrained(arguments.model))
    examples = []
    for part, most in (("train", arguments.documents), ("valid", arguments.judged)):
        corpus = prepare(data / f"{part}.jsonl", template, LENGTH).corpus
        rows = [corpus.document(i) for i in range(min(len(corpus), most))]
        examples.append(
            [
                {
                    "input_ids": tokens.tolist(),
                    "labels": [int(token) if own else -100 for token, own in zip(tokens, mask, strict=True)],
                    "length": len(tokens),
                }
                for tokens, mask in rows
            ]
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    return model, *examples, lambda batch: padded_batch(batch, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sequence-classification")
    parser.add_argument("--data", action="append", type=Path, default=[])
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--judged", type=int, default=500, help="documents to choose by, and as many to confirm on")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32, help="documents a step")
    parser.add_argument("--dtype", default="auto", help="of the search and its grid; PEFT is timed in two")
    parser.add_argument("--budget", default="standard")
    parser.add_argument("--allocate", choices=("activations", "gradients"))
    parser.add_argument("--grids", type=Path, help="an existing folder: runs of grids are kept there, and found again")
    parser.add_argument("--record", type=Path, help="an earlier record, whose grid is not trained again")
    parser.add_argument("--only", choices=("time", "regret", "compress"))
    parser.add_argument("--peft", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peft is not None:
        print(json.dumps(run_peft(arguments, arguments.peft)))
        return
    found = []
    for data in arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(arguments, data, Path(folder) / "s", arguments.grids))
        print(
            json.dumps({key: value for key, value in found[-1].items() if key != "grid"}), file=sys.stderr, flush=True
        )
    told = {"model": Path(arguments.model).name, "task": arguments.task, "budget": arguments.budget}
    told |= {name: getattr(arguments, name) for name in SETTINGS}
    print(json.dumps(told | {"machine": machine("peft"), "every": found}, indent=2))


if __name__ == "__main__":
    main()
