"""Output layers for classes: whether a checkpoint brings the one that is wanted, and where it begins if it does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_POOLER = "pooler"


def set_classes(config: Any, names: Sequence[str]) -> bool:
    """Puts the names into a model's config; True where it had the same ones, in whatever case, in the same order."""
    known = [name.casefold() for name in class_names(config)] == [name.casefold() for name in names]
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    return known


def class_names(config: Any) -> list[str]:
    """What a config calls its classes, by number."""
    named = getattr(config, "id2label", None) or {}
    return [str(named[number]) for number in sorted(named)]


def set_padding(config: Any, tokenizer: Any) -> None:
    """A model that reads a class at the last token of a row has to know what fills rows up."""
    text = config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def may_be_fresh(model: Any, parameter: str) -> bool:
    """Whether a parameter belongs to what stands behind the base model, or pools what comes out of it."""
    prefix = f"{model.base_model_prefix}."
    inner = parameter.removeprefix(prefix)
    return inner == parameter or inner.startswith(f"{_POOLER}.")


def head_parameters(model: Any) -> list[str]:
    """Those behind the base model."""
    return [name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")]


def whole_modules(model: Any, parameters: Iterable[str]) -> tuple[str, ...]:
    """The outermost modules that hold nothing but these parameters, in the model's order."""
    given = set(parameters)
    found: list[str] = []
    for path, module in model.named_modules():
        own = [f"{path}.{name}" for name, _ in module.named_parameters()]
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and own and given.issuperset(own) and not inside:
            found.append(path)
    return tuple(found)
