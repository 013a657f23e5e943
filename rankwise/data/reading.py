"""How rows become documents: what a task has to say for `prepare` to do the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar, Protocol

import numpy as np

from rankwise.data.corpus import Corpus
from rankwise.data.examples import Examples
from rankwise.data.fields import Shapes
from rankwise.data.problems import Problems
from rankwise.data.row import Row
from rankwise.data.tokeniser import Tokenised, Tokeniser

Marked = list[tuple[str, bool]]  # stretches of text, and whether they are trained
SHOWN_TOKENS = 160


class Sized(Protocol):
    """A document before it is tokenised."""

    @property
    def size(self) -> int:
        """Characters."""
        ...


class Reading(ABC):
    """One way of reading rows.

    Attributes:
        tokeniser: of the model that is to learn them.
        shapes: the shapes its rows may have.
        needs: what a row needs, in words.
    """

    tokeniser: Tokeniser
    shapes: ClassVar[Shapes]
    needs: ClassVar[str]

    @property
    @abstractmethod
    def digest(self) -> str:
        """Of all that decides how a model is talked to: an adapter wants it to be the same ever after."""

    @property
    @abstractmethod
    def key(self) -> list[object]:
        """With the same key the same rows give the same documents."""

    @abstractmethod
    def read(self, row: Row, problems: Problems) -> Any | None:
        """What a row says, or None with every reason noted."""

    @abstractmethod
    def drafts(self, document: Any) -> Sequence[Sized]:
        """The documents of a row, before tokenising; none where it has nothing to learn."""

    @abstractmethod
    def encode(self, drafts: Sequence[Any], max_length: int) -> list[Tokenised]:
        """Documents in the order of their drafts, as they are kept; what was cut to `max_length` is not `whole`."""

    @abstractmethod
    def examples(self, corpus: Corpus) -> Examples:
        """Kept documents as what they are."""

    @abstractmethod
    def shown(self, examples: Any, i: int) -> Marked:
        """A document for a person to look at."""

    def marked(self, tokens: np.ndarray, supervised: np.ndarray) -> Marked:
        """Tokens decoded: stretches of text, and whether they are trained."""
        runs = groupby(zip(tokens.tolist(), supervised.tolist(), strict=True), key=lambda pair: pair[1])
        return [(self.tokeniser.text([token for token, _ in run]), trained) for trained, run in runs]

    def excerpt(self, tokens: np.ndarray, supervised: np.ndarray) -> Marked:
        """As `marked`, of the stretch around the first trained token."""
        first = max(0, int(supervised.argmax()) - SHOWN_TOKENS // 2)
        part = slice(first, first + SHOWN_TOKENS)
        before = [("… ", False)] if first else []
        after = [(" …", False)] if part.stop < len(tokens) else []
        return [*before, *self.marked(tokens[part], supervised[part]), *after]
