"""From files to a trained adapter with its evidence: what `rankwise train` does.

out/
├── adapter_config.json  adapter_model.safetensors   PEFT's format
├── rankwise.json                                    everything about the run
├── metrics.jsonl  evaluation.json  samples.json     what was measured
├── README.md  report.html                           for people
└── checkpoints/
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.corpus import Corpus
from rankwise.data.prepare import prepare
from rankwise.data.split import overlap, split
from rankwise.data.template import Template
from rankwise.engine.evaluate import Evaluation, evaluate
from rankwise.engine.folder import RunFolder, held_folder
from rankwise.engine.loop import Outcome, train
from rankwise.engine.run import Loop, Run
from rankwise.errors import DataError
from rankwise.formats.tensors import write_text
from rankwise.frozen.load import Base, load_base
from rankwise.jobs.machine import machine_facts, versions
from rankwise.jobs.plan_text import plan_text
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.samples import sample_answers
from rankwise.jobs.tracking import tracked
from rankwise.jobs.watch import Watch
from rankwise.reports.card import write_card
from rankwise.reports.page import write_report
from rankwise.reports.reader import read_run
from rankwise.reports.verdict import judge
from rankwise.surgery.bank import Bank

ADAPTER = "adapter"
_HELD_BACK, _HELD_BACK_AT_MOST = 0.05, 500


@dataclass(frozen=True)
class Documents:
    """What is learnt from, judged by, and compared on; with what became of the rows of each."""

    train: Corpus
    valid: Corpus
    test: Corpus
    facts: dict[str, Any]


def run_training(request: TrainRequest, watch: Watch) -> dict[str, Any]:
    """Trains one adapter and writes the whole run folder; the summary is what `--json` prints.

    Raises:
        RankwiseError: of every kind; nothing of another run is overwritten, nothing learnt is lost.
        Interrupted: SIGINT or SIGTERM; a checkpoint has been saved.
    """
    with held_folder(request.out, resume=request.resume) as folder:
        with watch.stage(f"loading {request.model}"):
            base = load_base(request.model, dtype=request.dtype, device=request.device)
        template = Template(base.tokenizer, request.train_on)
        documents = read_documents(request, template, watch)
        with Bank(base.model) as bank:
            _prepare_adapter(bank, request)
            watch.say(plan_text(request, base, bank, documents, template))
            began = time.monotonic()
            outcome = _train(bank, request, documents, folder, watch)
            facts = _facts(request, base, documents, template) | {
                "training": _training_facts(folder, outcome, time.monotonic() - began)
            }
            bank.save(ADAPTER, request.out, facts)
            return _finish(bank, base, template, request, documents, facts, watch)


def _prepare_adapter(bank: Bank, request: TrainRequest) -> None:
    if request.continue_from is None:
        bank.add(ADAPTER, request.spec, seed=request.seed)
    else:
        bank.load(ADAPTER, request.continue_from)


def _train(bank: Bank, request: TrainRequest, documents: Documents, folder: RunFolder, watch: Watch) -> Outcome:
    names = set(Run.model_fields) & set(TrainRequest.model_fields)
    run = Run(**{name: getattr(request, name) for name in names})
    names = set(Loop.model_fields) & set(TrainRequest.model_fields)
    loop = Loop(**{name: getattr(request, name) for name in names})
    with tracked(request.track, request.out, request.table()) as track:

        def observe(event: dict[str, Any]) -> None:
            watch.event(event)
            track(event)

        return train(
            bank,
            {ADAPTER: run},
            documents.train,
            valid=documents.valid,
            loop=loop,
            out=folder,
            resume=request.resume,
            observe=observe,
        )[ADAPTER]


def read_documents(request: TrainRequest, template: Template, watch: Watch) -> Documents:
    """Training, validation and test documents, tokenised; without a validation file some are held back.

    Raises:
        DataError: bad rows, all listed; or validation documents that are also trained on.
    """

    def read(sources: Any, title: str) -> Any:
        with watch.stage(title) as advance:
            return prepare(
                sources,
                template,
                request.max_length,
                overlong=request.overlong,
                progress=lambda rows, share: advance(share),
            )

    found = read(list(request.data), "reading the documents")
    parts = {"train": found.report.to_json()}
    if request.valid is None:
        share = min(_HELD_BACK, _HELD_BACK_AT_MOST / len(found.corpus))
        train_on, valid = split(found.corpus, share=max(share, 2 / max(4, len(found.corpus))), seed=request.seed)
        parts["train"] |= _counts(train_on)
        parts["valid"] = parts["train"] | _counts(valid)
    else:
        held = read(request.valid, "reading the validation documents")
        train_on, valid, parts["valid"] = found.corpus, held.corpus, held.report.to_json()
    test = valid
    if request.test is not None:
        last = read(request.test, "reading the test documents")
        test, parts["test"] = last.corpus, last.report.to_json()
    for title, corpus in (("validation", valid), ("test", test)):
        seen = overlap(train_on, corpus)
        if seen:
            raise DataError(
                f"{seen} of {len(corpus)} {title} documents are also trained on; the comparison would prove nothing",
                hint="take them out of one file, or leave out --valid and a part of the documents is held back",
            )
    return Documents(train_on, valid, test, parts)


def _counts(corpus: Corpus) -> dict[str, int]:
    return {"documents": len(corpus), "tokens": len(corpus.tokens), "supervised": int(corpus.supervised.sum())}


def _facts(request: TrainRequest, base: Base, documents: Documents, template: Template) -> dict[str, Any]:
    return {
        "versions": versions(),
        "machine": machine_facts(base.device, base.precision),
        "settings": request.table(),
        "data": {name: _split_facts(report) for name, report in documents.facts.items()},
        "template": {"digest": template.digest},
        "command": request.command(),
    }


def _split_facts(report: dict[str, Any]) -> dict[str, Any]:
    files = [{"path": path, "sha256": digest} for path, digest in report["files"].items()]
    kept = ("documents", "tokens", "supervised", "truncated", "dropped")
    return {"files": files, **{name: report[name] for name in kept}}


def _training_facts(folder: RunFolder, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """Counted from the metrics, so that a resumed run counts what went before."""
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    tokens, busy = sum(s["tokens"] for s in steps), sum(s["seconds"] for s in steps)
    return {
        "steps": outcome.steps,
        "epochs": steps[-1]["epoch"] + 1 if steps else 0,
        "tokens": tokens,
        "supervised": sum(s["supervised"] for s in steps),
        "seconds": seconds,
        "tokens_per_second": tokens / busy if busy else 0.0,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "stopped": outcome.status,
        "best_step": outcome.best_step,
        "skipped_steps": outcome.skipped,
    }


def _finish(
    bank: Bank,
    base: Base,
    template: Template,
    request: TrainRequest,
    documents: Documents,
    facts: dict[str, Any],
    watch: Watch,
) -> dict[str, Any]:
    """The evidence: base against tuned on unseen documents, samples side by side, the report and the card."""
    found: Evaluation | None = None
    if len(documents.test) > 1:
        with watch.stage("comparing with the base") as advance:
            found = evaluate(bank, [ADAPTER], documents.test, progress=lambda done, of: advance(done / of))
        _write_json(request.out / "evaluation.json", found.record())
    with watch.stage("answering samples") as advance:
        samples = sample_answers(bank, ADAPTER, base.tokenizer, template, documents.test, advance)
    _write_json(request.out / "samples.json", samples)
    with watch.stage("writing the report"):
        report, _ = write_report(request.out), write_card(request.out)
    return {
        "out": str(request.out),
        "report": str(report),
        "spec": bank.adapter(ADAPTER).spec.model_dump(mode="json"),
        "verdict": judge(read_run(request.out)).sentence,
        "training": facts["training"],
        "evaluation": found.summary() if found is not None else None,
        "samples": samples,
    }


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
