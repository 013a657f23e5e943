"""README.md: the adapter's model card, as Hugging Face reads it.

It travels further than the folder does, so it names files and models but no paths of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from rankwise.reports import numbers
from rankwise.reports.folder import CARD, place
from rankwise.reports.paired import pair
from rankwise.reports.reader import read_run
from rankwise.reports.run import AdapterLoss, BaseLoss, Evaluation, Record, Run, Sample, Setting, Split, Whole
from rankwise.reports.sites import group_sites
from rankwise.reports.start import started
from rankwise.reports.verdict import judge, stop
from rankwise.reports.words import Words, accuracy
from rankwise.tasks import DEFAULT, TASKS, Task

LONGEST_SAMPLE = 1_500
MOST_SAMPLES = 3

_PLACES = ("model", "data", "valid", "test", "out", "continue_from", "onto", "replay")  # settings that name one

# A name the Hub could know: `gpt2` or `owner/model`.  Anything else is a place on somebody's disk.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def write_card(folder: Path) -> Path:
    """Writes `README.md` into a run's folder and says where.

    Raises:
        RunFolderError: the folder cannot be read; lists all that is missing or malformed.
    """
    run = read_run(folder)
    return place(run.folder, CARD, render(run))


def render(run: Run) -> str:
    """The whole card."""
    verdict = judge(run)
    parts = [
        _front_matter(run.record),
        f"# {_escaped(run.name)}",
        _what(run.record),
        f"**{_escaped(verdict.sentence)}**",
        "\n".join(f"- {_escaped(caveat)}" for caveat in verdict.caveats),
        _usage(run.record),
        _comparison(run.evaluation, Words.of(run)) if run.evaluation else "",
        _samples(run.samples[:MOST_SAMPLES]),
        _adapter(run.record),
        _training(run.record),
        _settings(run.record),
        _data(run.record),
        _limits(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(record: Record) -> str:
    # A licence that nobody stated is left out: a guess would be a promise.
    base = [f"base_model: {json.dumps(record.base.name)}"] if _HUB_NAME.fullmatch(record.base.name) else []
    whole = record.noun == "model"
    library, tags = ("transformers", ["- rankwise"]) if whole else ("peft", ["- lora", "- rankwise"])
    lines = [*base, f"library_name: {library}", f"pipeline_tag: {_task(record).pipeline}", "tags:", *tags]
    return "\n".join(["---", *lines, "---"])


def _what(record: Record) -> str:
    base = _escaped(_base(record))
    if record.noun == "model":
        return f"{base} with all its weights trained further, by rankwise."
    return f"A LoRA adapter for {base}, trained with rankwise."


def _task(record: Record) -> Task:
    return TASKS.get(record.task, TASKS[DEFAULT])


def _base(record: Record) -> str:
    name = record.base.name
    return name if _HUB_NAME.fullmatch(name) else _last_part(name) or name


def _usage(record: Record) -> str:
    base, task = json.dumps(_base(record), ensure_ascii=False), _task(record)
    names = [one.name for one in record.classes]
    told = f", num_labels={len(names)}" if names else ""
    reader = "tokenizer" if task.reads == "AutoTokenizer" else "processor"
    here = '"path/to/this/folder"'
    if record.noun == "model":
        return f"""## Use

```python
from transformers import {task.loads}, {task.reads}

{reader} = {task.reads}.from_pretrained({here})
model = {task.loads}.from_pretrained({here})
```{_named(names)}"""
    enlarged = "\nmodel.resize_token_embeddings(len(tokenizer))" if record.new_tokens else ""
    return f"""## Use

```python
from peft import PeftModel
from transformers import {task.loads}, {task.reads}

{reader} = {task.reads}.from_pretrained({here if record.new_tokens else base})
model = {task.loads}.from_pretrained({base}{told}){enlarged}
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

Or without a line of code: `rankwise {_verb(record)} --model MODEL --adapter path/to/this/folder`.{_named(names)}"""


def _verb(record: Record) -> str:
    return "chat" if record.task == DEFAULT else "evaluate --data FILE"


def _named(classes: Sequence[str]) -> str:
    return f"\n\nClasses, from 0: {_escaped(', '.join(classes))}." if classes else ""


def _comparison(evaluation: Evaluation, words: Words) -> str:
    base = (words.reference, numbers.decimal(evaluation.base.loss), *_measures(evaluation.base, words), "", "", "")
    rows: list[tuple[str, ...]] = [base]
    for adapter in evaluation.adapters:
        delta, places = adapter.delta, numbers.decimals_for((adapter.delta.high - adapter.delta.low) / 2)
        paired = pair(evaluation.per_document, adapter.name)
        rows.append(
            (
                adapter.name,
                numbers.decimal(adapter.loss),
                *_measures(adapter, words),
                numbers.signed(delta.mean, places),
                f"{numbers.signed(delta.low, places)} … {numbers.signed(delta.high, places)}",
                f"{paired.better:,} of {paired.documents:,}" if paired else "",
            )
        )
    interval = f"{100 * evaluation.confidence:g} % interval"
    measures = ("accuracy", "macro-F1") if words.classes else ("perplexity",)
    head = ("model", "loss", *measures, "difference", interval, "documents better")
    documents, tokens = numbers.counted(evaluation.documents, "document"), numbers.counted(evaluation.tokens, "token")
    measured = documents if words.classes else f"{documents}, {tokens}"
    note = f"Nats per {words.unit} on {measured}; paired by document, bootstrap. Negative is better."
    return f"## Base against tuned\n\n{_table(head, rows)}\n\n{note}"


def _measures(one: BaseLoss | AdapterLoss, words: Words) -> tuple[str, ...]:
    if not words.classes:
        return (numbers.perplexity(one.loss),)
    return accuracy(one), "" if one.macro_f1 is None else numbers.decimal(one.macro_f1)


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    parts = ["## Before and after"]
    for sample in samples:
        texts = [("Prompt", sample.prompt), ("Before", sample.before), ("After", sample.after)]
        if sample.reference is not None:
            texts.append(("Reference", sample.reference))
        parts += [f"{label}:\n\n{_fenced(text)}" for label, text in texts]
        parts.append("---")
    return "\n\n".join(parts[:-1])


def _adapter(record: Record) -> str:
    rows = [
        (group.where, " ".join(group.names), group.sites, group.rank, group.alpha, group.scale)
        for group in group_sites(record.sites)
    ]
    spec, parameters = record.spec, numbers.counted(record.parameters, "parameter")
    if isinstance(spec, Whole):
        return f"## The model\n\nAll weights were trained: {parameters}."
    axes = f"Form {spec.form}, scaling {spec.scaling}, storage {record.base.storage}, init {spec.init}"
    start = f" Start: {started(record.start, len(record.sites))}." if record.start is not None else ""
    said = f"{parameters}. {axes}, dropout {numbers.plain(spec.dropout)}.{start}{_tokens(record)}"
    table = _table(("where", "layers", "sites", "rank", "alpha", "scale"), rows)
    return f"## The adapter\n\n{_escaped(said)}\n\n{table}"


def _tokens(record: Record) -> str:
    """Which tokens it has rows for, in a sentence."""
    texts = {number: text for text, number in record.new_tokens.items()}
    each = dict.fromkeys(token for tokens in record.tokens.values() for token in tokens)
    named = ", ".join(f"{texts[token]} ({token})" if token in texts else str(token) for token in each)
    return f" Rows of its own in {', '.join(record.tokens)} for the tokens {named}." if each else ""


def _training(record: Record) -> str:
    training = record.training
    if training is None:
        return ""
    rows: list[tuple[object, object]] = [
        ("ending", f"training {stop(training.stopped)}"),
        ("steps", numbers.count(training.steps)),
        ("epochs", numbers.plain(training.epochs)),
        ("tokens", f"{numbers.count(training.tokens)}, {numbers.count(training.supervised)} supervised"),
        ("time", f"{numbers.duration(training.seconds)}, {numbers.count(round(training.tokens_per_second))} tokens/s"),
    ]
    if training.best_step is not None:
        rows.append(("best step", numbers.count(training.best_step)))
    if training.peak_memory_bytes is not None:
        rows.append(("peak memory", numbers.size(training.peak_memory_bytes)))
    rows += [(name, version) for name, version in record.versions.items()]
    return f"## Training\n\n{_table(('fact', 'value'), rows)}"


def _settings(record: Record) -> str:
    if not record.settings:
        return ""
    rows = [(setting.name, _value(setting, record), setting.reason) for setting in record.settings]
    return f"## Every setting and its reason\n\n{_table(('setting', 'value', 'reason'), rows)}"


def _value(setting: Setting, record: Record) -> str:
    """A setting's value; of a place on this machine its name only."""
    value = setting.value
    if setting.name not in _PLACES or not isinstance(value, str | list | tuple):
        return numbers.anything(value)
    if setting.name == "model" and value == record.base.name:
        return _base(record)
    places = [value] if isinstance(value, str) else value
    return ", ".join(_last_part(str(one)) for one in places)


def _last_part(place: str) -> str:
    return re.split(r"[\\/]", place.rstrip("\\/"))[-1]


def _data(record: Record) -> str:
    if record.data is None:
        return ""
    head = ("split", "documents", "tokens", "supervised", "truncated", "dropped", "files")
    return f"## Data\n\n{_table(head, [_split_row(name, split) for name, split in record.data.splits])}"


def _split_row(name: str, split: Split) -> tuple[str, ...]:
    dropped = "; ".join(f"{number:,} × {reason}" for reason, number in split.dropped.items() if number)
    files = ", ".join(f"{PurePath(file.path).name} ({file.sha256[:12]}…)" for file in split.files)
    counts = map(numbers.count, (split.documents, split.tokens, split.supervised))
    if split.held_back:
        return (name, *counts, "–", "counted with training", files)
    return (name, *counts, numbers.count(split.truncated), dropped or "none", files)


def _limits(run: Run) -> str:
    measured = (
        f"Measured on {numbers.counted(run.evaluation.documents, 'document')} only"
        if run.evaluation
        else "Not measured on any document"
    )
    return (
        f"## Limits\n\n{measured}; nothing is known about other tasks, or about what was forgotten. "
        f"Licence, biases and gaps of the base hold here too. "
        f"Base fingerprint {_escaped(run.record.base.fingerprint)}, "
        f"{run.record.noun} digest {_escaped(run.record.digest)}."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [
        head,
        ["---"] * len(head),
        *([_escaped(cell if isinstance(cell, str) else numbers.anything(cell)) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text that means nothing to Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """Text in a fence longer than any it holds."""
    left = len(text) - LONGEST_SAMPLE
    shown = text if left <= 0 else f"{text[:LONGEST_SAMPLE]}\n… and {numbers.counted(left, 'more character')}"
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"
