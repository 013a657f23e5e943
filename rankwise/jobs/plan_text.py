"""What is about to be trained, told before the first step: sites, scale, settings, documents, and one row of them."""

from __future__ import annotations

from typing import Any

import torch

from rankwise.adapters.adapter import Adapter
from rankwise.engine.rates import rates
from rankwise.engine.run import Run
from rankwise.frozen.load import Base
from rankwise.jobs.documents import Documents
from rankwise.jobs.reader import Reader
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.vocabulary import token_counts
from rankwise.planning.amounts import shown
from rankwise.planning.memory import Memory
from rankwise.reports.run import Start
from rankwise.reports.start import started
from rankwise.surgery.bank import Bank
from rankwise.texts import plain

_NAMED_CLASSES = 12
_ROLES = {"m": "magnitudes", "lam": "lambda", "embedding B": "B of embeddings", "whole": "trained whole"}


def plan_text(
    request: TrainRequest,
    base: Base,
    bank: Bank,
    documents: Documents,
    reader: Reader,
    memory: Memory | None,
    begun: Start | None,
) -> str:
    """Rich markup; trained tokens of the shown row are highlighted."""
    names = bank.names
    trained = sum(parameter.numel() for name in names for _, parameter in bank.named_parameters(name))
    size = sum(parameter.numel() for parameter in base.model.parameters()) - trained
    lines = [
        f"[bold]base[/bold]      {plain(base.name)}: {size / 1e6:,.1f} M parameters, "
        f"{str(base.precision.dtype).removeprefix('torch.')} ({base.precision.reason}), {base.device}",
        *(_adapter(base, bank.adapter(names[0]), trained, size, documents, begun) if names else _whole(base)),
        *_rates(bank, request.run),
        *_classes(base),
        *(f"[bold]{name:9}[/bold] {_counted(name, documents.facts)}" for name in documents.facts),
        *([_memory(memory, whole=request.whole)] if memory is not None else []),
        "[bold]settings[/bold]",
        *(f"  {row['name']:15} {_shown(row['value']):14} [dim]{row['reason']}[/dim]" for row in request.table()),
        "[bold]one row as it is trained[/bold] (trained tokens highlighted)",
        _row(documents, reader),
    ]
    return "\n".join(lines)


def _adapter(
    base: Base, adapter: Adapter, trained: int, size: int, documents: Documents, begun: Start | None
) -> list[str]:
    """`trained`, `size`: parameters, its own and the base's."""
    return [
        f"[bold]adapter[/bold]   {trained / 1e6:,.2f} M parameters "
        f"({trained / size:.2%} of the base), alpha {adapter.spec.alpha:g}, {adapter.spec.scaling}",
        *_layers(adapter),
        *(f"            {path}: trained whole" for path in adapter.modules),
        *(f"            {path}: rows of {len(rows.tokens)} tokens" for path, rows in adapter.tokens.items()),
        *_new_tokens(base, adapter.spec.new_tokens, documents),
        *([f"[bold]start[/bold]     {plain(started(begun, len(adapter.sites)))}"] if begun is not None else []),
    ]


def _whole(base: Base) -> list[str]:
    masters = any(weight.dtype == torch.bfloat16 for weight in base.model.parameters())
    return ["[bold]trained[/bold]   all weights, no adapter" + (", stepped in float32" if masters else "")]


def _rates(bank: Bank, run: Run) -> list[str]:
    """The optimiser's groups, each with what it holds."""
    name = next(iter(bank.names), None)
    named = bank.model.named_parameters() if name is None else bank.named_parameters(name)
    sizes = {path: parameter.numel() for path, parameter in named}
    told = [
        f"{'all weights' if name is None else _ROLES.get(rate.role, rate.role)}: {len(rate.names):,} tensors, "
        f"{sum(sizes[path] for path in rate.names):,} parameters, rate {run.lr * rate.factor:g}, "
        f"weight decay {rate.weight_decay:g}"
        for rate in rates(bank, name, run)
    ]
    return [
        "[bold]rates[/bold]     at their highest, of each group of the optimiser",
        *(f"            {line}" for line in told),
    ]


def _layers(adapter: Adapter) -> list[str]:
    """Layers of one name and scale on one line, whatever ranks they have."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for path, factors in adapter.sites.items():
        kinds.setdefault((path.rsplit(".", 1)[-1], f"{factors.scale:.4g}"), []).append(factors.rank)
    spans = {kind: (min(ranks), max(ranks)) for kind, ranks in kinds.items()}
    return [
        f"            {len(kinds[leaf, scale])} × {leaf}: rank {least if least == most else f'{least} to {most}'}, "
        f"effective scale {scale}"
        for (leaf, scale), (least, most) in spans.items()
    ]


def _new_tokens(base: Base, ids: tuple[int, ...], documents: Documents) -> list[str]:
    counts = token_counts(base.tokenizer, ids, documents.train)
    named = ", ".join(f"{plain(text)} × {count:,}" for text, count in counts.items())
    return [f"            new tokens, and how often they are met: {named}"] if ids else []


def _memory(memory: Memory, *, whole: bool) -> str:
    trained = memory.adapters + memory.gradients + memory.optimiser
    what = "masters" if whole else "adapter"
    parts = {
        "weights": memory.weights,
        f"{what}, gradients and optimiser": trained,
        "activations": memory.activations + memory.working,
        "a copy of the best": memory.best,
        "the process": memory.process,
    }
    named = ", ".join(f"{name} {shown(size)}" for name, size in parts.items() if size)
    return f"[bold]memory[/bold]    {shown(memory.peak)} at most expected: {named}"


def _counted(name: str, all_facts: dict[str, dict[str, Any]]) -> str:
    facts = all_facts[name]
    text = f"{facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['supervised']:,} of them supervised"
    if facts.get("held_back"):
        return f"{text}; held back from the same files"
    if "each_epoch" in facts:
        return f"{text}; {facts['each_epoch']:,} of them in an epoch{_apart(facts)}"
    lost = left_out(facts)
    both = name == "train" and all_facts.get("valid", {}).get("held_back")
    return "; ".join([text, *(["before the split:"] if both and lost else []), *lost]).replace(":; ", ": ")


def _apart(facts: dict[str, Any]) -> str:
    """Old documents that are not mixed in."""
    told = {"held back of that file": facts["held_back_of_it"], "left out, being judged by": facts["judged_by"]}
    return "".join(f"; {count:,} {what}" for what, count in told.items() if count)


def left_out(facts: dict[str, Any]) -> list[str]:
    """What of the rows is not learnt from or measured, and how much, each in a few words of rich markup."""
    cut = [f"{facts['truncated']:,} cut to length"] if facts["truncated"] else []
    dropped = [f"{count:,} dropped: {plain(reason)}" for reason, count in facts["dropped"].items()]
    unused = [f"field {plain(repr(field))} of {count:,} rows is not used" for field, count in facts["unused"].items()]
    return [*cut, *dropped, *unused]


def _classes(base: Base) -> list[str]:
    if not base.classes:
        return []
    named = plain(", ".join(base.classes[:_NAMED_CLASSES]) + (" …" if len(base.classes) > _NAMED_CLASSES else ""))
    head = (
        f"the checkpoint has no head for them, so {plain(', '.join(base.fresh))} begins fresh and is trained whole"
        if base.fresh
        else "the checkpoint's own head tells them apart"
    )
    return [f"[bold]classes[/bold]   {len(base.classes)}: {named}; {head}"]


def _row(documents: Documents, reader: Reader) -> str:
    pieces = reader.shown(documents.train)
    return "".join(f"[black on green]{plain(t)}[/]" if trained else plain(t) for t, trained in pieces)


def _shown(value: Any) -> str:
    if value is None or value in ([], {}):
        return "-"
    return plain(", ".join(map(str, value)) if isinstance(value, list) else str(value))
