"""Which base this is: the fingerprint of what an adapter has not brought along itself."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from rankwise.adapters.adapter import Adapter
from rankwise.formats.record import check_base, read_record
from rankwise.frozen.coded import parameters_of
from rankwise.frozen.fingerprint import fingerprint
from rankwise.surgery.vocabulary import Vocabulary


class Identity:
    """Of a clean model, taken before it is changed."""

    def __init__(self, model: nn.Module, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._parameters = parameters_of(model)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base alone, whatever adapters it holds."""
        return fingerprint(self._parameters.items())

    def beside(self, modules: Iterable[str], known: int) -> str:
        """Of the base without what an adapter brings along, which does not make another base of it.

        That are modules, and rows of tokens behind those `known`.
        """
        brought, tall = tuple(f"{path}." for path in modules), self.vocabulary.parameters()
        if not brought and known >= self.vocabulary.size:
            return self.fingerprint
        left = {name: p for name, p in self._parameters.items() if not name.startswith(brought or "\n")}
        cut = {name: p[:known] for name, p in left.items() if isinstance(p, Tensor) and id(p) in tall}
        return fingerprint((left | cut).items())

    def check(self, folder: Path, adapter: Adapter) -> None:
        """Whether an adapter's folder is of this base.

        Raises:
            AdapterMismatchError: it is of another.
        """
        record = read_record(folder)
        if record is None or record["base"]["fingerprint"] == self.fingerprint:  # of the whole, as records once were
            return
        known = record["base"].get("vocabulary") or self.vocabulary.size
        check_base(record, self.beside(adapter.modules, known), folder)
