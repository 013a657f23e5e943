"""From files to a trained adapter with its evidence: what `rankwise train` does.

out/
├── adapter_config.json  adapter_model.safetensors   PEFT's format
├── tokenizer.json  tokenizer_config.json  …         where the adapter has tokens of its own
├── rankwise.json                                    everything about the run
├── metrics.jsonl  evaluation.json  samples.json     what was measured
├── README.md  report.html                           for people
└── checkpoints/
"""

from __future__ import annotations

import json
import signal
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankwise.adapters.spec import LoraSpec
from rankwise.data.rows import is_file
from rankwise.data.template import Template
from rankwise.data.tokeniser import add_tokens
from rankwise.engine.begin import COMPUTED_STARTS, begin
from rankwise.engine.evaluate import Evaluation
from rankwise.engine.folder import RunFolder, held_folder
from rankwise.engine.interrupt import Interrupted
from rankwise.engine.loop import Outcome, train
from rankwise.engine.run import Loop, Pruning, Run
from rankwise.errors import DataError, RankwiseWarning
from rankwise.formats.tensors import write_text
from rankwise.frozen.load import Base, load_base
from rankwise.jobs.documents import Documents, read_documents
from rankwise.jobs.evaluate import evaluate_finite, load_adapter
from rankwise.jobs.machine import machine_facts, peak_memory_bytes, versions
from rankwise.jobs.plan import predicted_training
from rankwise.jobs.plan_text import plan_text
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.samples import sample_answers
from rankwise.jobs.tracking import check_trackers, tracked
from rankwise.jobs.vocabulary import token_counts, with_tokens_of
from rankwise.jobs.watch import Advance, Watch
from rankwise.reports.card import write_card
from rankwise.reports.page import write_report
from rankwise.reports.reader import read_run
from rankwise.reports.run import Start
from rankwise.reports.verdict import judge, stop
from rankwise.surgery.bank import Bank
from rankwise.texts import json_text

ADAPTER = "adapter"


def run_training(request: TrainRequest, watch: Watch) -> dict[str, Any]:
    """Trains one adapter and writes the whole run folder; the summary is what `--json` prints.

    Raises:
        RankwiseError: of every kind; nothing of another run is overwritten, nothing learnt is lost.
        Interrupted: SIGINT or SIGTERM; what was learnt has been saved, and `way_on` is the command to go on with.
    """
    try:
        with held_folder(request.out, resume=request.resume) as folder:
            return _run(request, folder, watch)
    except Interrupted as heard:
        heard.way_on = _way_on(request, "last whole step")
        raise
    except KeyboardInterrupt:  # the second Ctrl-C did not wait for that
        at_once = Interrupted(signal.SIGINT)
        at_once.way_on = _way_on(request, "last checkpoint")
        raise at_once from None


def _way_on(request: TrainRequest, saved: str) -> str:
    if RunFolder(request.out).begun:
        return f"; everything up to the {saved} is saved.  Go on with:\n  {request.command()} --resume"
    return f" before the first step.  Begin again with:\n  {request.command()}"


def _run(request: TrainRequest, folder: RunFolder, watch: Watch) -> dict[str, Any]:
    for source in (*request.data, *filter(None, (request.valid, request.test))):
        is_file(source)  # one that is missing is found out before a model is loaded
    check_trackers(request.track)
    with watch.stage(f"loading {request.model}"):
        loaded = _loaded(request)
    base = with_tokens_of(loaded, list(filter(None, [request.continue_from])), force=request.force)
    new_tokens = add_tokens(base.tokenizer, request.add_tokens)
    template = Template(base.tokenizer, request.train_on)
    documents = read_documents(request, template, watch)
    with Bank(base.model) as bank:
        begun: Start | None = None
        if request.continue_from is None:
            spec = request.spec.model_copy(update={"new_tokens": new_tokens})
            begun = _begin(bank, request, spec, documents, folder, watch)
        else:
            load_adapter(bank, ADAPTER, request.continue_from, base, template, force=request.force)
        memory = predicted_training(request, base, bank, documents.train)
        watch.say(plan_text(request, base, bank, documents, template, memory, begun))
        _warn_of_unmet(base, new_tokens, documents)
        began = time.monotonic()
        outcome = _train(bank, request, documents, folder, watch)
        facts = _facts(request, base, documents, template) | {
            "new_tokens": dict(zip(request.add_tokens, new_tokens, strict=True)),
            "training": _training_facts(folder, outcome, time.monotonic() - began, len(documents.train.tokens))
            | {"predicted_memory_bytes": memory.peak if memory is not None else None},
        }
        if begun is not None:
            facts["start"] = asdict(begun)
        if new_tokens or base is not loaded:
            base.tokenizer.save_pretrained(request.out)
        bank.save(ADAPTER, request.out, facts)
        if outcome.failed:
            warnings.warn(
                f"training {stop(outcome.status)}; the adapter that is kept is that of step {outcome.best_step}",
                RankwiseWarning,
                stacklevel=2,
            )
        return _finish(bank, base, template, request, documents, facts, watch)


def _loaded(request: TrainRequest) -> Base:
    spec = request.spec
    remainder = max(spec.rank, *spec.rank_pattern.values(), 0) if spec.init == "loftq" else 0
    return load_base(
        request.model,
        dtype=request.dtype,
        device=request.device,
        storage=request.storage,
        remainder_rank=remainder,
    )


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
    names = set(Run.model_fields) & set(TrainRequest.model_fields)
    pruning = Pruning(target_rank=request.target_rank, orthogonality=request.orthogonality)
    run = Run(**{name: getattr(request, name) for name in names}, pruning=pruning)
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


def _facts(request: TrainRequest, base: Base, documents: Documents, template: Template) -> dict[str, Any]:
    return {
        "versions": versions(),
        "machine": machine_facts(base.device, base.precision),
        "settings": request.table(),
        "data": documents.facts,
        "template": {"digest": template.digest},
        "command": request.command(),
    }


def _warn_of_unmet(base: Base, new_tokens: tuple[int, ...], documents: Documents) -> None:
    """A token that is never met is a slip of the finger, as often as not."""
    unmet = [text for text, count in token_counts(base.tokenizer, new_tokens, documents.train).items() if not count]
    if unmet:
        said = f"no training document holds {', '.join(map(repr, unmet))}: the model learns only not to say it"
        warnings.warn(said, RankwiseWarning, stacklevel=3)


def _training_facts(folder: RunFolder, outcome: Outcome, seconds: float, epoch_tokens: int) -> dict[str, Any]:
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
            found = _compared(bank, documents, advance)
    if found is not None:
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


def _compared(bank: Bank, documents: Documents, advance: Advance) -> Evaluation | None:
    """The comparison, or a warning in its place: what was learnt is saved, so this must not end the run."""
    try:
        return evaluate_finite(bank, [ADAPTER], documents.test, advance)
    except DataError as error:
        warnings.warn(f"not compared with the base: {error.message}", RankwiseWarning, stacklevel=2)
        return None


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value, indent=1) + "\n")
