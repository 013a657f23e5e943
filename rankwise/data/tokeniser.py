"""Text to tokens with a mask: a token is trained when it holds text of a trained stretch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken

from rankwise.errors import DataError, SpecError, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
Masked = tuple[np.ndarray, np.ndarray]  # tokens and mask, each `[T]`


@dataclass(frozen=True)
class Piece:
    """A text that is tokenised as a whole, and its trained stretches `[begin, end)`, in characters and in order."""

    text: str
    spans: tuple[Span, ...] = ()

    def split(self, seams: Sequence[int]) -> tuple[Piece, ...]:
        """The same text in parts; no stretch reaches across a seam."""
        parts = []
        for begin, end in zip([0, *seams], [*seams, len(self.text)], strict=True):
            spans = tuple((a - begin, b - begin) for a, b in self.spans if begin <= a < end)
            parts.append(Piece(self.text[begin:end], spans))
        return tuple(parts)


@dataclass(frozen=True)
class Draft:
    """A document before it is tokenised.

    Attributes:
        pieces: each tokenised by itself, so that no token reaches across.
        opened: begins with what the tokenizer itself puts before a text (BOS, for those that do).
        closed: ends with EOS, trained.
    """

    pieces: tuple[Piece, ...]
    opened: bool = False
    closed: bool = False

    @property
    def size(self) -> int:
        """Characters."""
        return sum(len(piece.text) for piece in self.pieces)

    def cut(self, characters: int) -> Draft:
        """Its beginning."""
        ends = accumulate((len(piece.text) for piece in self.pieces), initial=0)
        pieces = []
        for piece, begin in zip(self.pieces, ends, strict=False):
            left = max(0, characters - begin)
            spans = tuple((a, min(b, left)) for a, b in piece.spans if a < left)
            pieces.append(Piece(piece.text[:left], spans))
        return Draft(tuple(pieces), self.opened)


@dataclass(frozen=True, eq=False)
class Tokenised:
    """A document.

    Attributes:
        tokens: int32 `[T]`.
        supervised: bool `[T]`, True for training targets; never for the first token, which nothing precedes.
        whole: False when so much text was left out at its end that not all its tokens are here.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    whole: bool = True

    def cut(self, most: int) -> Tokenised:
        """Its first tokens; what loses any is not whole."""
        return Tokenised(self.tokens[:most], self.supervised[:most], self.whole and len(self.tokens) <= most)


class Tokeniser:
    """A transformers tokenizer, asked for exactly what training needs.

    Raises:
        DataError: the tokenizer cannot tell which characters a token comes from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} cannot tell which characters a token comes from",
                hint="a fast tokenizer is needed: AutoTokenizer finds it where the model has a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, with nothing put before or behind it."""
        return list(self._batch([text])["input_ids"][0])

    def encode(self, drafts: Sequence[Draft], most: int | None = None) -> list[Tokenised]:
        """Documents in the order of their drafts.

        Args:
            drafts: the texts.
            most: no more than so many tokens of each are of interest.  Of a text far longer than that only the
                beginning is tokenised, so that time and memory stay bounded; the result is then not `whole`.
        """
        limit = None if most is None else self.characters(most)
        cut = [draft if limit is None or draft.size <= limit else draft.cut(limit) for draft in drafts]
        pieces = iter(self._encode_pieces([piece for draft in cut for piece in draft.pieces]))
        found = []
        for draft, given in zip(cut, drafts, strict=True):
            tokens, supervised = _joined([next(pieces) for _ in draft.pieces])
            found.append(self._framed(draft, tokens, supervised, whole=draft is given))
        return found

    def characters(self, tokens: int) -> int:
        """So much text has more than so many tokens, whatever it says."""
        return (tokens + 1) * self._longest_token

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as they are read."""
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def _framed(self, draft: Draft, tokens: np.ndarray, supervised: np.ndarray, whole: bool) -> Tokenised:
        opening = self.opening if draft.opened and tuple(tokens[: len(self.opening)]) != self.opening else ()
        ending = [self.eos] if draft.closed and not (len(tokens) and tokens[-1] == self.eos) else []
        tokens = np.concatenate([opening, tokens, ending]).astype(np.int32)
        supervised = np.concatenate([[False] * len(opening), supervised, [True] * len(ending)]).astype(np.bool_)
        supervised[:1] = False
        return Tokenised(tokens, supervised, whole)

    def _encode_pieces(self, pieces: Sequence[Piece]) -> list[Masked]:
        if not pieces:
            return []
        batch = self._batch([piece.text for piece in pieces])
        found = []
        for piece, ids, offsets in zip(pieces, batch["input_ids"], batch["offset_mapping"], strict=True):
            begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
            supervised = np.zeros(len(ids), dtype=np.bool_)
            for begin, end in piece.spans:
                supervised |= (begins < end) & (ends > begin)
            found.append((np.asarray(ids, dtype=np.int32), supervised))
        return found

    def _batch(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,
        )

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by itself: BOS, or nothing."""
        bare, full = self.ids("a"), list(self.tokenizer("a")["input_ids"])
        begins = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return tuple(full[: next(begins, 0)])

    @cached_property
    def splittable(self) -> bool:
        """Whether parts tokenised apart are the text again: not so with tokenizers that put a space before each."""
        joined = self.ids("a") + self.ids("b")
        return bool(self.tokenizer.decode(joined, clean_up_tokenization_spaces=False) == "ab")

    @cached_property
    def _longest_token(self) -> int:
        """Characters in the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the vocabulary, the merges, every rule of tokenising, and the names of the special tokens."""
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        rules |= {"truncation": None, "padding": None}  # states of the last call, not of the tokenizer
        named = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if name != "pad_token"}
        return hashlib.sha256(json.dumps([rules, named], sort_keys=True).encode()).hexdigest()


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """Adds tokens to a tokenizer, each text whole wherever it stands, and says their ids.

    They are words and no special tokens: what an answer says with them is shown.

    Raises:
        SpecError: a text is a token already; all of them are listed.
    """
    known = tokenizer.get_vocab()
    problems = [f"{text!r} is one already (number {known[text]})" for text in texts if text in known]
    if problems:
        hint = "leave them out, or spell them otherwise"
        raise SpecError(f"the tokenizer cannot take these tokens:\n{listing(problems)}", hint=hint)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    return tuple(tokenizer.convert_tokens_to_ids(list(texts)))


def _joined(parts: Sequence[Masked]) -> Masked:
    return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([mask for _, mask in parts])
