"""Examples of other tasks, laid in memory and on disk as a corpus whose mask means something of their own.

examples      tokens of a document          mask                      judged
Labelled      a text or two, its class      the second text, class    the class
Pairs         a source, its target          the target                every token of the target
Masked        a text                        what may be hidden        the hidden ones
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from rankwise.data.corpus import Corpus
from rankwise.data.examples import Examples

Self = TypeVar("Self", bound="OnCorpus")

SHARE = 0.15  # of a text's tokens are hidden (BERT, arXiv:1810.04805, §3.1)
_AS_MASK, _AS_ANOTHER = 0.8, 0.1  # of the hidden ones; the rest stand as they are


@dataclass(frozen=True, eq=False)
class OnCorpus(Examples):
    """Examples over a corpus, `laid` as the table above says."""

    laid: Corpus

    @property
    def origins(self) -> np.ndarray:  # type: ignore[override]
        return self.laid.origins

    @property
    def files(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.laid.files

    def __len__(self) -> int:
        return len(self.laid)

    def lengths(self) -> np.ndarray:
        return self.laid.lengths()

    def subset(self: Self, indices: Sequence[int] | np.ndarray) -> Self:
        return replace(self, laid=self.laid.subset(indices))

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.laid.digest} {self._meaning()!r}".encode()).hexdigest()

    @abstractmethod
    def _meaning(self) -> tuple[Any, ...]:
        """What beside the corpus decides what is learnt."""


@dataclass(frozen=True, eq=False)
class Labelled(OnCorpus):
    """Texts, or pairs of texts, each of one class.

    Attributes:
        laid: a document's tokens, and behind them the number of its class.
        classes: their names, by number.
    """

    classes: tuple[str, ...]

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and which of them are of the second text; as views."""
        tokens, second = self.laid.document(i)
        return tokens[:-1], second[:-1]

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of each document, int64 `[D]`."""
        return self.laid.tokens[self.laid.bounds[1:] - 1].astype(np.int64)

    @cached_property
    def paired(self) -> bool:
        """Whether there are second texts."""
        return int(self.laid.supervised.sum()) > len(self)

    def lengths(self) -> np.ndarray:
        return self.laid.lengths() - 1

    def supervised_counts(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    def content(self, i: int) -> bytes:
        """Without the class: a text is on one side even where it is labelled twice, and differently."""
        return np.ascontiguousarray(self.document(i)[0]).tobytes()

    def _meaning(self) -> tuple[Any, ...]:
        return ("labelled", self.classes)


@dataclass(frozen=True, eq=False)
class Pairs(OnCorpus):
    """A text to read and a text to write.

    Attributes:
        laid: the source, and behind it the target, which the mask marks.
    """

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target, as views."""
        tokens, target = self.laid.document(i)
        begin = int(target.argmax())
        return tokens[:begin], tokens[begin:]

    def supervised_counts(self) -> np.ndarray:
        return self.laid.supervised_counts()

    def content(self, i: int) -> bytes:
        """The source: however many targets it has, all are on one side."""
        return np.ascontiguousarray(self.document(i)[0]).tobytes()

    def _meaning(self) -> tuple[Any, ...]:
        return ("pairs",)


@dataclass(frozen=True, eq=False)
class Masked(OnCorpus):
    """Texts some of whose tokens are hidden and have to be guessed.

    How many is fixed, so that a step's loss has one divisor however it is cut; which ones follows from seed, document
    and draw: others at every step, and always the same ones in evaluation.

    Attributes:
        laid: the text; the mask marks what may be hidden, which special tokens may not.
        mask_token: stands where a token is hidden.
        words: size of the vocabulary, of which other tokens are drawn.
        seed, draw: see above; draw 0 is that of evaluation.
    """

    mask_token: int
    words: int
    seed: int = 0
    draw: int = 0

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens as they are shown, the places of the hidden ones, and what these are, `[T]`, `[k]`, `[k]`."""
        tokens, free = self.laid.document(i)
        places = np.flatnonzero(free)
        generator = np.random.Generator(np.random.PCG64([self.seed, self.draw, i]))
        hidden = np.sort(generator.permutation(places)[: int(_hidden(len(places)))])
        chance = generator.random(len(hidden))
        others = generator.integers(self.words, size=len(hidden))
        shown = tokens.astype(np.int64)
        wanted = shown[hidden]
        shown[hidden] = np.where(
            chance < _AS_MASK, self.mask_token, np.where(chance < _AS_MASK + _AS_ANOTHER, others, wanted)
        )
        return shown, hidden, wanted

    def supervised_counts(self) -> np.ndarray:
        return _hidden(self.laid.supervised_counts())

    def content(self, i: int) -> bytes:
        return self.laid.content(i)

    def drawn(self, step: int) -> Masked:
        return replace(self, draw=step + 1)

    def _meaning(self) -> tuple[Any, ...]:
        return ("masked", self.mask_token, self.words, self.seed)


def _hidden(free: Any) -> Any:
    """How many of so many tokens are hidden, at least one."""
    return np.maximum(1, np.rint(SHARE * np.asarray(free))).astype(np.int64)
