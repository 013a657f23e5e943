"""From files to a trained adapter, or a trained model, with its evidence: what `rankwise train` does.

out/
├── adapter_config.json  adapter_model.safetensors   PEFT's format
├── config.json  model.safetensors  tokenizer…       or, of form full, transformers'
├── tokenizer.json  tokenizer_config.json  …         where the adapter has tokens of its own
├── rankwise.json                                    everything about the run
├── metrics.jsonl  evaluation.json  samples.json     what was measured
├── README.md  report.html                           for people
└── checkpoints/
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.begin import COMPUTED_STARTS, begin
from rankwise.engine.evaluate import Evaluation
from rankwise.engine.folder import RunFolder, held_folder
from rankwise.engine.interrupt import going_on
from rankwise.engine.loop import Outcome, train
from rankwise.errors import DataError, RankwiseWarning
from rankwise.formats.record import WHOLE
from rankwise.formats.tensors import write_text
from rankwise.jobs.documents import Documents, read_documents
from rankwise.jobs.evaluate import after_training, evaluate_finite, frequencies, load_adapter
from rankwise.jobs.machine import machine_facts, peak_memory_bytes, versions
from rankwise.jobs.plan import predicted_training
from rankwise.jobs.plan_text import plan_text
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.samples import Asked, asked_of
from rankwise.jobs.subject import Subject, subject_of
from rankwise.jobs.tracking import check_trackers, tracked
from rankwise.jobs.vocabulary import token_counts
from rankwise.jobs.watch import Advance, Watch
from rankwise.jobs.whole import Before, before_training, save_whole
from rankwise.reports.card import write_card
from rankwise.reports.page import write_report
from rankwise.reports.reader import read_run
from rankwise.reports.run import Start
from rankwise.reports.verdict import judge, stop
from rankwise.surgery.bank import Bank
from rankwise.surgery.beneath import Beneath
from rankwise.texts import json_text

ADAPTER, _BENEATH = "adapter", "beneath"


def run_training(request: TrainRequest, watch: Watch) -> dict[str, Any]:
    """Trains one adapter, or all weights, and writes the whole run folder; the summary is what `--json` prints.

    SIGINT and SIGTERM end it with an `Interrupted` (`engine/interrupt.py`): what was learnt has been saved, and its
    `way_on` is the command to go on with.

    Raises:
        RankwiseError: of every kind; nothing of another run is overwritten, nothing learnt is lost.
    """
    with going_on(partial(_way_on, request)), held_folder(request.out, resume=request.resume) as folder:
        return _run(request, folder, watch)


def _way_on(request: TrainRequest, saved: bool) -> str:
    if RunFolder(request.out).begun:
        last = "whole step" if saved else "checkpoint"
        return f"; everything up to the last {last} is saved.  Go on with:\n  {request.command()} --resume"
    return f" before the first step.  Begin again with:\n  {request.command()}"


def _run(request: TrainRequest, folder: RunFolder, watch: Watch) -> dict[str, Any]:
    check_trackers(request.track)
    subject = subject_of(request, watch)
    base = subject.base
    documents = read_documents(request, subject.reader, watch)
    asked = asked_of(base.model, base.tokenizer, subject.reader, documents.test)
    with Bank(base.model) as bank, _beneath(bank, request, subject, watch) as beneath:
        begun = None if request.whole else _adapter(bank, request, subject, documents, folder, watch)
        memory = predicted_training(request, base, bank, documents.train)
        watch.say(plan_text(request, base, bank, documents, subject.reader, memory, begun))
        _warn_of_unmet(subject, documents)
        before: Before | None = None
        if request.whole:
            judged = not frequencies(base, subject.classes)
            before = before_training(bank, base, documents.test, asked, watch, judged=judged)
        began = time.monotonic()
        outcome = _train(bank, request, documents, folder, watch)
        facts = _facts(request, subject, documents) | {
            "training": _training_facts(folder, outcome, time.monotonic() - began, documents.epoch_tokens)
            | {"predicted_memory_bytes": memory.peak if memory is not None else None},
        }
        if before is not None:
            save_whole(bank, base, before, request.out, facts)
        else:
            _save_adapter(bank, request, subject, begun, facts | _joined(bank, request, beneath))
        if outcome.failed:
            kept = "model" if request.whole else "adapter"
            warnings.warn(
                f"training {stop(outcome.status)}; the {kept} that is kept is that of step {outcome.best_step}",
                RankwiseWarning,
                stacklevel=2,
            )
        with watch.stage("answering samples") as advance:
            samples = asked.beside(*_answers(bank, asked, before, advance))
        found = _compared(bank, subject, documents, before, watch)
        return _finish(request, facts, found, samples, watch) | {"spec": _spec(bank)}


def _adapter(
    bank: Bank, request: TrainRequest, subject: Subject, documents: Documents, folder: RunFolder, watch: Watch
) -> Start | None:
    """Adds the adapter that is trained; what a fresh one took, where it is more than chance."""
    if request.continue_from is not None:
        load_adapter(bank, ADAPTER, request.continue_from, subject.base, subject.reader.digest, force=request.force)
        return None
    spec = request.spec_with(subject.base.fresh).model_copy(update={"new_tokens": subject.new_tokens})
    return _begin(bank, request, spec, documents, folder, watch)


@contextmanager
def _beneath(bank: Bank, request: TrainRequest, subject: Subject, watch: Watch) -> Iterator[Beneath | None]:
    """The adapter that is trained on top of, merged beneath the model, if there is one."""
    if request.onto is None:
        yield None
        return
    load_adapter(bank, _BENEATH, request.onto, subject.base, subject.reader.digest, force=request.force)
    with watch.stage(f"merging {request.onto} beneath"):
        beneath = Beneath(bank, _BENEATH)
    try:
        yield beneath
    finally:
        beneath.lift()


def _joined(bank: Bank, request: TrainRequest, beneath: Beneath | None) -> dict[str, Any]:
    """Puts what was learnt and what it stands on in the bank as one adapter, on the bare base; what the record says."""
    if beneath is None:
        return {}
    made = beneath.joined(bank.adapter(ADAPTER))
    own = bank.adapter(ADAPTER).plain()
    bank.remove(ADAPTER)
    beneath.lift()
    bank.put(ADAPTER, made.adapter)
    return {"onto": {"folder": str(request.onto), "digest": beneath.adapter.digest(), "learnt": own.digest()}}


def _save_adapter(
    bank: Bank, request: TrainRequest, subject: Subject, begun: Start | None, facts: dict[str, Any]
) -> None:
    own: dict[str, Any] = {"new_tokens": dict(zip(request.add_tokens, subject.new_tokens, strict=True))}
    if begun is not None:
        own["start"] = asdict(begun)
    if subject.enlarged:
        subject.base.tokenizer.save_pretrained(request.out)
    bank.save(ADAPTER, request.out, facts | own)


def _spec(bank: Bank) -> dict[str, Any]:
    return bank.adapter(ADAPTER).spec.model_dump(mode="json") if bank.names else {"form": WHOLE}


def _answers(bank: Bank, asked: Asked, before: Before | None, advance: Advance) -> tuple[list[str], list[str]]:
    """To the samples, by the base and by what was trained."""
    if before is not None:
        return before.answers, asked.answers(bank, None, advance)
    base = asked.answers(bank, None, lambda share: advance(share / 2))
    return base, asked.answers(bank, ADAPTER, lambda share: advance(0.5 + share / 2))


def _begin(
    bank: Bank, request: TrainRequest, spec: LoraSpec, documents: Documents, folder: RunFolder, watch: Watch
) -> Start | None:
    """Adds the fresh adapter; what that took, where it is more than chance."""
    settings: dict[str, Any] = {"seed": request.seed, "start": request.start, "out": folder}
    if request.init not in COMPUTED_STARTS:
        begin(bank, ADAPTER, spec, documents.train, **settings)
        return None
    with watch.stage(f"starting with {request.init}") as advance:
        begun = begin(bank, ADAPTER, spec, documents.train, **settings, advance=advance)
    return Start(**begun.record())


def _train(bank: Bank, request: TrainRequest, documents: Documents, folder: RunFolder, watch: Watch) -> Outcome:
    name = None if request.whole else ADAPTER
    with tracked(request.track, request.out, request.table()) as track:

        def observe(event: dict[str, Any]) -> None:
            watch.event(event)
            track(event)

        return train(
            bank,
            {name: request.run},
            documents.train,
            valid=documents.valid,
            loop=request.loop.model_copy(update={"replay": documents.replay}),
            out=folder,
            resume=request.resume,
            observe=observe,
        )[name]


def _facts(request: TrainRequest, subject: Subject, documents: Documents) -> dict[str, Any]:
    base, classes = subject.base, subject.classes
    return {
        "task": request.task,
        **({"classes": classes.to_json()} if classes is not None else {}),
        "versions": versions(),
        "machine": machine_facts(base.device, base.precision),
        "settings": request.table(),
        "data": documents.facts,
        "template": {"digest": subject.reader.digest},
        "command": request.command(),
    }


def _warn_of_unmet(subject: Subject, documents: Documents) -> None:
    """A token that is never met is a slip of the finger, as often as not."""
    counts = token_counts(subject.base.tokenizer, subject.new_tokens, documents.train)
    unmet = [text for text, count in counts.items() if not count]
    if unmet:
        said = f"no training document holds {', '.join(map(repr, unmet))}: the model learns only not to say it"
        warnings.warn(said, RankwiseWarning, stacklevel=3)


def _training_facts(folder: RunFolder, outcome: Outcome, seconds: float, epoch_tokens: float) -> dict[str, Any]:
    """Counted from the metrics, so that a resumed run counts what went before."""
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    tokens, busy = sum(s["tokens"] for s in steps), sum(s["seconds"] for s in steps)
    return {
        "steps": outcome.steps,
        "epochs": tokens / epoch_tokens,
        "tokens": tokens,
        "supervised": sum(s["supervised"] for s in steps),
        "seconds": max(seconds, busy),  # of a resumed run's first part the steps alone are known
        "tokens_per_second": tokens / busy if busy else 0.0,
        "peak_memory_bytes": peak_memory_bytes(),
        "stopped": outcome.status,
        "best_step": outcome.best_step,
        "skipped_steps": outcome.skipped,
    }


def _finish(
    request: TrainRequest,
    facts: dict[str, Any],
    found: Evaluation | None,
    samples: list[dict[str, str]],
    watch: Watch,
) -> dict[str, Any]:
    """The evidence on disk: base against tuned on unseen documents, samples side by side, the report and the card."""
    if found is not None:
        _write_json(request.out / "evaluation.json", found.record())
    _write_json(request.out / "samples.json", samples)
    with watch.stage("writing the report"):
        report, _ = write_report(request.out), write_card(request.out)
    return {
        "task": request.task,
        "out": str(request.out),
        "report": str(report),
        "verdict": judge(read_run(request.out)).sentence,
        "training": facts["training"],
        "evaluation": found.summary() if found is not None else None,
        "samples": samples,
    }


def _compared(
    bank: Bank, subject: Subject, documents: Documents, before: Before | None, watch: Watch
) -> Evaluation | None:
    """The comparison, or a warning in its place: what was learnt is saved, so this must not end the run."""
    if len(documents.test) < 2:
        return None
    shares = frequencies(subject.base, subject.classes)
    try:
        with watch.stage("comparing with the base") as advance:
            if before is None:
                return evaluate_finite(bank, [ADAPTER], documents.test, advance, shares)
            return after_training(bank, before, documents.test, shares, advance)
    except DataError as error:
        warnings.warn(f"not compared with the base: {error.message}", RankwiseWarning, stacklevel=2)
        return None


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value, indent=1) + "\n")
