"""What the engine has to know of a task; everything else is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from rankwise.data.examples import Examples
from rankwise.engine.batch import Batch
from rankwise.engine.outlet import Outlet
from rankwise.errors import ModelError

Layout = Literal["packed", "rows"]
Documents = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Way:
    """One way for documents through a model.

    Attributes:
        layout: one behind the other, or each in a row.
        outlet: what of the model is taken.
        attention: attention is ours, document by document (`engine/attention.py`); without, the model's own.
    """

    layout: Layout
    outlet: Outlet
    attention: bool


class Task(ABC):
    """How one kind of examples goes through a model.

    Attributes:
        by_rows: why documents are not packed, where they never are.
        classifies: the model's logits are one row a document, over classes.
        hint: what is wanted, for errors.

    Raises:
        ModelError: the model is not made for this.
    """

    by_rows: ClassVar[str] = ""
    classifies: ClassVar[bool] = False
    hint: ClassVar[str] = ""

    def __init__(self, model: Any) -> None:
        self.model = model

    @abstractmethod
    def ways(self) -> Iterator[Way]:
        """From the fastest on; the first that agrees with the model itself is taken."""

    @abstractmethod
    def probe(self, *, changed: bool = False) -> Examples:
        """Three short documents of random content; `changed`: the first one is another, as long."""

    @abstractmethod
    def rows(self, examples: Any, documents: Documents) -> Batch:
        """A row a document."""

    def packed(self, examples: Any, documents: Documents, runs: Sequence[int]) -> Batch:
        """One stream; `runs` are how many documents, one group after the other, go through one adapter."""
        raise NotImplementedError

    def check(self, examples: Any, logits: list[Tensor]) -> None:  # noqa: B027 (most have nothing to add)
        """Whether the model, that gives these logits for the probe's documents alone, is what it should be.

        Raises:
            ModelError: it is not.
        """

    @property
    def named(self) -> dict[str, Any]:
        """What else the model is called with."""
        return {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}

    @property
    def pad(self) -> int:
        """What fills rows up."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return 0 if pad is None else int(pad)

    @property
    def words(self) -> int:
        """Size of the vocabulary.

        Raises:
            ModelError: it has none.
        """
        words = getattr(self.model.config.get_text_config(), "vocab_size", None)
        if words is None:
            raise self._refused("reads no text")
        return int(words)

    def _random_texts(self, sizes: Sequence[int], *, changed: bool) -> list[np.ndarray]:
        """Random tokens, none of which is the one that fills rows up."""
        texts = []
        for seed, size in enumerate(sizes):
            tokens = np.random.default_rng(seed).integers(self.words, size=size)
            texts.append(np.where(tokens == self.pad, (self.pad + 1) % self.words, tokens).astype(np.int32))
        return [texts[0][::-1].copy(), *texts[1:]] if changed else texts

    def _refused(self, why: str) -> ModelError:
        return ModelError(f"{type(self.model).__name__} {why}", hint=self.hint)
