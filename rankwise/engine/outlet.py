"""What of a model is taken when a pass has gone through it, and what is still to be done to have logits.

The output layer is run in chunks, on judged positions only (`engine/head.py`); so the pass has to end before it.

Shape letters: U outputs, H hidden width, V classes (words of the vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rankwise.engine.head import Shaping
from rankwise.surgery.layer import Stand


class NoOutletError(Exception):
    """This model cannot be asked that way."""


class Outlet:
    """The model's own logits `[U, V]`: nothing is left to be done.

    Attributes:
        head: the layer that makes logits of what is taken, or None.
        shaping: what the model does to them then.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head: Any = None
        self.shaping = Shaping()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Held while the engine asks this way."""
        yield

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        """`[U, V]`, or `[U, H]` where there is a head."""
        logits = self.model(**inputs).logits
        return logits.reshape(-1, logits.shape[-1])


class OfBase(Outlet):
    """Hidden states of the model without its head; families that scale or cap logits are known from their configs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.head = model.get_output_embeddings()
        self.shaping = Shaping.of(model.config.get_text_config())

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        hidden = self.model.base_model(**inputs)[0]
        return hidden.flatten(0, 1)


class BeforeHead(Outlet):
    """What the output layer is given, whatever the model does before it (a transform, a scaling).

    Something that gives back its input stands in the layer's place, so that the model's logits are that input.  A model
    that does more to them is not asked this way: `logits` would be another tensor.

    Raises:
        NoOutletError: when opened: the layer's place is not to be had.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.head = model.get_output_embeddings()
        self._through = _Through(self.head)

    @contextmanager
    def opened(self) -> Iterator[None]:
        *parents, leaf = _place(self.model, self.head).split(".")
        parent = self.model.get_submodule(".".join(parents))
        setattr(parent, leaf, self._through)
        try:
            yield
        finally:
            setattr(parent, leaf, self.head)

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        hidden = self.model(**inputs).logits
        given, self._through.given = self._through.given, None  # the graph must not live on with it
        if given is None or hidden is not given:
            raise NoOutletError(f"{type(self.model).__name__} does more than its output layer")
        return hidden.flatten(0, 1)


class _Through(nn.Module):
    """Stands in for an output layer, gives back what it is given and remembers which tensor that was."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.__dict__["head"] = head  # not a part: what walks over the model's modules must not find it twice
        self.given: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["head"], name)

    def forward(self, hidden: Tensor) -> Tensor:
        self.given = hidden
        return hidden


def _place(model: Any, head: Any) -> str:
    for path, module in model.named_modules():
        if module is head:
            parts = path.split(".")
            above = [model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]
            if not any(isinstance(one, Stand) for one in above):  # else each adapter has an output layer of its own
                return path
    raise NoOutletError(f"the output layer of {type(model).__name__} is within a module that is trained whole")
