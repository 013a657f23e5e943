"""What a bank remembers of an adapter beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.adapters.spec import LoraSpec


@dataclass(frozen=True)
class Member:
    """An adapter of a bank.

    Attributes:
        spec: as asked for.
        sites, modules, tokens: paths of what it changes, trains whole, and has rows of.
        held: where it has something in a stand: all of these, and what shares its rows.
        nested: as of an `Adapter`.
    """

    spec: LoraSpec
    sites: tuple[str, ...]
    modules: tuple[str, ...]
    tokens: tuple[str, ...]
    held: tuple[str, ...]
    nested: tuple[int, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        return self.sites + self.modules + self.tokens
