"""An answer as it comes: from tokens to text that can be sent, up to a stop string that never is.

A character may take several tokens, and a stop string may begin in one and end in another, so that text is held back
until it is certain.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rankwise.serving.requests import Token

_UNFINISHED = "\ufffd"  # what bytes are decoded to that are no character, or none yet


@dataclass(frozen=True)
class Said:
    """A token of an answer, and how many characters of it came before."""

    token: Token
    start: int


@dataclass(frozen=True)
class Piece:
    """What can be sent: text, and the tokens that it is known to come from."""

    text: str
    tokens: tuple[Said, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class Answer:
    """One answer.

    Args:
        ends: tokens at which it is over and which are no part of its text.
        until: strings before which it ends.

    Attributes:
        stopped: one of these strings has come; whatever comes after is not heard.
        count: tokens heard.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], until: Sequence[str] = ()) -> None:
        self._tokenizer, self._ends, self._until = tokenizer, ends, tuple(until)
        self.stopped = False
        self.count = 0
        self._tokens: list[int] = []
        self._window = self._read = 0  # where decoding begins, and up to which token its text has been read
        self._held = ""  # read, and not sent
        self._sent = 0  # characters
        self._said: list[Said] = []  # of tokens that have not been sent

    def hear(self, token: Token) -> Piece:
        """The next token; what can be sent now."""
        if self.stopped:
            return Piece("")
        self.count += 1
        if token.id in self._ends:
            return Piece("")
        self._said.append(Said(token, self._sent + len(self._held)))
        self._tokens.append(token.id)
        return self._take(self._decoded(whole=False))

    def end(self) -> Piece:
        """No token comes any more; what had been held back."""
        if self.stopped:
            return Piece("")
        found = self._take(self._decoded(whole=True))
        if self.stopped:
            return found
        text, tokens = found.text + self._held, (*found.tokens, *self._said)
        self._sent += len(self._held)
        self._held, self._said = "", []
        return Piece(text, tokens)

    def _decoded(self, *, whole: bool) -> str:
        """Text of the tokens that were not read yet; nothing while they may end within a character.

        Decoded behind those read last, as a decoder may treat the first token of a text otherwise.
        """
        before = self._decode(self._tokens[self._window : self._read])
        after = self._decode(self._tokens[self._window :])
        if not whole and (after.endswith(_UNFINISHED) or not after.startswith(before)):
            return ""
        if len(after) > len(before):
            self._window, self._read = self._read, len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _take(self, text: str) -> Piece:
        held = self._held + text
        ends = [(held.find(stop) + len(stop), held.find(stop)) for stop in self._until if stop in held]
        if ends:
            self.stopped = True
            return self._send(held[: min(ends)[1]], "")
        keep = max((_begun(held, stop) for stop in self._until), default=0)
        return self._send(held[: len(held) - keep], held[len(held) - keep :])

    def _send(self, text: str, held: str) -> Piece:
        self._held = held
        self._sent += len(text)
        ready = tuple(one for one in self._said if one.start < self._sent) if text else ()
        self._said = [] if self.stopped else self._said[len(ready) :]
        return Piece(text, ready)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` a stop string may begin with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def token_text(tokenizer: Any, token: int) -> str:
    """A token by itself, with the space that some tokenizers take from a text's first."""
    text = str(tokenizer.decode([token]))
    stored = tokenizer.convert_ids_to_tokens(token)
    spaced = isinstance(stored, str) and stored.startswith("▁") and not text.startswith(" ")
    return f" {text}" if spaced else text


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """The bytes that a token stands for, also where they are no whole character; None where nobody knows."""
    text, stored = token_text(tokenizer, token), tokenizer.convert_ids_to_tokens(token)
    if _UNFINISHED not in text:
        return list(text.encode())
    if isinstance(stored, str) and len(stored) == 6 and stored.startswith("<0x") and stored.endswith(">"):
        return [int(stored[3:5], 16)]
    known = _bytes_of_letters()
    if isinstance(stored, str) and all(letter in known for letter in stored):
        return [known[letter] for letter in stored]
    return None


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The letters in which byte-level tokenizers write bytes down (GPT-2): printable ones stand for themselves."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}
