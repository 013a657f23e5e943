"""Tokens that an adapter has for itself: where they come from, and the tokenizer that travels with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.data.examples import Examples
from rankwise.data.laid import OnCorpus
from rankwise.errors import AdapterFileError, AdapterMismatchError
from rankwise.formats.peft import token_ids
from rankwise.frozen.load import Base, read_tokenizer

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def with_tokens_of(base: Base, folders: Sequence[Path], *, force: bool) -> Base:
    """The base with the tokenizer that adapters with tokens of their own were trained with.

    Without such adapters it is the base as it is.

    Raises:
        AdapterFileError: an adapter has rows for tokens that the base's tokenizer does not know, and brings none that
            does (unless `force`).
        AdapterMismatchError: its tokenizer is no larger version of the base's (unless `force`), or two adapters bring
            tokenizers that differ.
    """
    rows = {folder: token_ids(folder) for folder in folders}
    known = set(base.tokenizer.get_vocab().values()) if any(rows.values()) else set()  # pictures have no vocabulary
    found: dict[Path, Any] = {}
    for folder, tokens in rows.items():
        new = [token for token in tokens if token not in known]
        if new and all((folder / name).exists() for name in _TOKENIZER):
            found[folder] = read_tokenizer(folder)
            _check_larger(base, folder, found[folder], force=force)
        elif new and not force:
            raise AdapterFileError(
                f"{folder}: has rows for tokens that the tokenizer of {base.name} does not know "
                f"({', '.join(map(str, new[:5]))}), and no tokenizer that does",
                hint="put the tokenizer's files into the folder; to go on without these tokens, --force",
            )
    if not found:
        return base
    (first, tokenizer), *others = found.items()
    for folder, other in others:
        if other.get_vocab() != tokenizer.get_vocab():
            raise AdapterMismatchError(
                f"{first} and {folder} have different tokens of their own, so that a text is not the same for both",
                hint="evaluate them one by one",
            )
    return replace(base, tokenizer=tokenizer)


def token_counts(tokenizer: Any, ids: Iterable[int], examples: Examples) -> dict[str, int]:
    """How often tokens occur in documents of text, by their texts."""
    corpus: Any = examples.laid if isinstance(examples, OnCorpus) else examples
    return {str(tokenizer.convert_ids_to_tokens(token)): int((corpus.tokens == token).sum()) for token in ids}


def _check_larger(base: Base, folder: Path, tokenizer: Any, *, force: bool) -> None:
    larger = tokenizer.get_vocab()
    lost = [text for text, token in base.tokenizer.get_vocab().items() if larger.get(text) != token]
    if lost and not force:
        raise AdapterMismatchError(
            f"{folder}: its tokenizer knows {lost[0]!r} and {len(lost) - 1} other tokens of {base.name} not, or "
            "by other numbers",
            hint="use the base it was trained on; to go on all the same, --force",
        )
