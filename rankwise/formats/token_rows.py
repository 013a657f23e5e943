"""Rows of tokens in PEFT's format: `trainable_token_indices`, a list or one by layer, and `trainable_tokens_delta`.

PEFT calls them a delta; they are the rows themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankwise.adapters.tokens import TokenRows

KEY, _ROWS = "trainable_token_indices", ".token_adapter.trainable_tokens_delta"


def said_tokens(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Tokens by the end of a layer's path; a list without one, which means the embedding, is under "".

    Raises:
        ValueError: it is neither.
    """
    said = config.get(KEY)
    by_name = said if isinstance(said, dict) else {} if said is None else {"": said}
    for name, ids in by_name.items():
        whole = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
        if not whole or len(set(ids)) != len(ids):
            raise ValueError(f"{KEY} = {said!r}: expected tokens by their numbers, each once, or such by layer")
        if not ids:
            raise ValueError(f"{KEY}: names no token{f' for {name!r}' if name else ''}")
    return by_name


def take_rows(rest: dict[str, Tensor], said: Mapping[str, list[int]]) -> tuple[dict[str, TokenRows], list[str]]:
    """Rows by path, taken out of the `rest` of a file's tensors, and what is wrong with them."""
    stored = {key.removesuffix(_ROWS): rest.pop(key) for key in list(rest) if key.endswith(_ROWS)}
    found, problems, met = {}, [], []
    for path, rows in stored.items():
        name = max((name for name in said if path.endswith(name)), key=len, default=None)
        if name is None:
            problems.append(f"{path}: has rows of tokens, and {KEY} does not name it")
        elif rows.dim() != 2 or len(rows) != len(said[name]):
            problems.append(f"{path}: rows {tuple(rows.shape)} for {len(said[name])} tokens of {KEY}")
        else:
            found[path] = TokenRows(said[name], rows)
            met.append(said[name])
    # Of layers that share their weight the first alone has rows in the file.
    absent = [name for name, ids in said.items() if ids not in met and not problems]
    return found, problems + [f"{KEY} names {name or 'the embedding'!r}, of which there are no rows" for name in absent]


def written_rows(tokens: Mapping[str, TokenRows]) -> tuple[dict[str, Tensor], dict[str, list[int]] | None]:
    """Tensors by key, without prefix, and what the config says of them."""
    tensors: dict[str, Tensor] = {f"{path}{_ROWS}": rows.rows for path, rows in tokens.items()}
    return tensors, {path: rows.tokens for path, rows in tokens.items()} or None
