"""An adapter as a value: what a file holds and a bank can bind.  Knows paths of sites, but no model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters.lowrank import LowRank
from rankwise.adapters.spec import ZERO_STARTS, LoraSpec
from rankwise.adapters.tokens import TokenRows
from rankwise.errors import BankError, SpecError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checked_name(name: str) -> str:
    """An adapter's name, if it is one.  Names are opaque: compared whole, never a path, a key or a pattern."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BankError(
            f"{name!r} is not an adapter name",
            hint="1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
        )
    return name


@dataclass(frozen=True)
class Adapter:
    """A spec and what became of it.

    Attributes:
        spec: as asked for; ranks and scales are read from `sites`, never from here.
        sites: path → factors, in the model's order.
        modules: path → parameter name → tensor, for layers trained whole (`modules_to_save`).
        expects: path → frozen weight that was stored along and that the base must hold.
        tokens: path → rows of an embedding or a head.
        nested: the ranks at which it was trained, ascending, where every prefix of its directions is an adapter too.
    """

    spec: LoraSpec
    sites: Mapping[str, LowRank]
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    expects: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    nested: tuple[int, ...] = ()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under a stable name: `<site>.A`, `<site>.B`, …, `<module>.<parameter>`, `<embedding>.rows`."""
        for path, factors in self.sites.items():
            yield from ((f"{path}.{name}", tensor) for name, tensor in factors.state_dict().items())
        for path, parameters in self.modules.items():
            for name, tensor in parameters.items():
                yield f"{path}.{name}", tensor.detach()
        for path, own in self.tokens.items():
            yield f"{path}.rows", own.rows.detach()

    def plain(self) -> Adapter:
        """The same in the tensors that every tool can read: A and B of every site that has any rank left."""
        plain = {path: factors.plain() for path, factors in self.sites.items()}
        return replace(self, sites={path: factors for path, factors in plain.items() if factors.rank})

    def check_divisible(self, name: str) -> None:
        """That the first of its directions can be an adapter by themselves.

        Raises:
            SpecError: of form `dora` or `adalora`, or its start is whole with all directions only.
        """
        if self.spec.form != "lora":
            raise SpecError(
                f"{name!r} is of form {self.spec.form}, whose first directions are no adapter by themselves",
                hint="nested ranks take form lora",
            )
        if self.spec.init not in ZERO_STARTS:
            raise SpecError(
                f"{name!r} began with init {self.spec.init}, which is at the base with all directions only",
                hint=f"nested ranks take init {', '.join(ZERO_STARTS)}",
            )

    def prefix(self, rank: int) -> Adapter:
        """The plain adapter of the first `rank` directions of a nested one: ΔW = s(rank)·B[:, :rank]·A[:rank].

        Alpha stays, and s(rank) is what the spec's scaling makes of it.  A site of a lower rank keeps its own.

        Raises:
            SpecError: as `check_nested`.
        """
        self.check_nested(rank)
        sites = {}
        for path, factors in self.sites.items():
            A, B, scale = factors.prefix(rank, self.spec.scaling)
            sites[path] = LowRank(A.detach(), B.detach(), scale, factors.dropout)
        pattern = {key: min(own, rank) for key, own in self.spec.rank_pattern.items()}
        spec = self.spec.model_copy(update={"rank": min(self.spec.rank, rank), "rank_pattern": pattern})
        return replace(self, spec=spec, sites=sites, nested=())

    def check_nested(self, rank: int) -> None:
        """That its first `rank` directions have learnt to be an adapter.

        Raises:
            SpecError: the adapter is not nested, or has not so many directions.
        """
        if not self.nested:
            raise SpecError(
                "the adapter is not nested: the first of its directions alone are no adapter",
                hint="train one with --nested, or cut this one with rankwise compress",
            )
        if not 1 <= rank <= self.nested[-1]:
            raise SpecError(
                f"rank {rank}: the adapter has ranks 1 to {self.nested[-1]}",
                hint=f"it was trained at ranks {', '.join(map(str, self.nested))}",
            )

    def parameter_count(self) -> int:
        return sum(tensor.numel() for _, tensor in self.tensors())

    def start_digest(self) -> str | None:
        """SHA-256 of what a residual start takes off, which training never changes; None where nothing is."""
        buffers = {p: dict(factors.named_buffers()) for p, factors in self.sites.items()}
        kept = [(f"{path}.{name}", own[name]) for path, own in buffers.items() for name in ("A0", "B0") if name in own]
        return _hashed(hashlib.sha256(), kept) if kept else None

    def digest(self) -> str:
        """SHA-256 of names, scales, shapes and bytes, in whatever order: equal if and only if the adapters are."""
        sha = hashlib.sha256()
        for path, factors in sorted(self.sites.items()):
            sha.update(f"{path} {factors.scale:.12g}\n".encode())  # a file has alpha with 14 digits
        for path, own in sorted(self.tokens.items()):
            sha.update(f"{path} {own.ids.tolist()}\n".encode())
        return _hashed(sha, self.tensors())


def _hashed(sha: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    for name, tensor in sorted(tensors, key=itemgetter(0)):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return str(sha.hexdigest())
