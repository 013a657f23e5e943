"""A bank of adapters on one frozen base: the handle through which everything else reaches a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zlib import crc32

import torch
from torch import nn

from rankwise.adapters.adapter import Adapter, checked_name
from rankwise.adapters.dropout import mixed
from rankwise.adapters.spec import LoraSpec
from rankwise.adapters.tokens import TokenRows
from rankwise.errors import BankError, RankwiseWarning, nearest
from rankwise.formats.peft import read_adapter, task_of, write_adapter
from rankwise.formats.record import describe, write_record
from rankwise.frozen.coded import storage_of
from rankwise.kernels.sizes import Storage
from rankwise.surgery.begin import begun
from rankwise.surgery.binding import check_apart, check_fits
from rankwise.surgery.identity import Identity
from rankwise.surgery.layer import AdaptedLayer, CopiedLayer, Stand
from rankwise.surgery.member import Member
from rankwise.surgery.merge import Merged, MergeReport
from rankwise.surgery.routing import Mix, Prefix, Route, Router, Way, check_mixes
from rankwise.surgery.saving import warn_of_sites
from rankwise.surgery.sites import Site, choose_modules, choose_sites, find_sites
from rankwise.surgery.tokens import TokenLayer
from rankwise.surgery.vocabulary import Vocabulary, declare_untied


class Bank:
    """Adapters on one base.  The model is untouched until the first adapter comes and after the last one goes.

    While adapters are held, every base parameter is frozen and each targeted layer is replaced by an `AdaptedLayer`;
    `close` (or leaving a `with`) puts all of it back: modules, tied weights, `requires_grad` flags, to the bit.

    Raises:
        BankError: the model is held by another bank.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(module, Stand) for module in model.modules()):
            raise BankError("the model is already held by a bank", hint="use that bank, or close it first")
        self.model: Any = model
        self.router = Router()
        self._members: dict[str, Member] = {}
        self._stands: dict[str, Stand] = {}
        self._flags: dict[str, bool] = {}
        self._merged: Merged | None = None

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── what is there ────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every layer of the base that can be adapted, by path."""
        return find_sites(self.model)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module of the base by every path it has."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @property
    def storage(self) -> Storage:
        """How the base's linear layers are held."""
        return storage_of(self.model)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens that the base knows."""
        return Vocabulary(self.model, self.sites)

    @cached_property
    def identity(self) -> Identity:
        """Which base it is, clean."""
        return Identity(self.model, self.vocabulary)

    @property
    def base_fingerprint(self) -> str:
        """Of the base alone, whatever adapters it holds."""
        return self.identity.fingerprint

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def adapter(self, name: str) -> Adapter:
        """The adapter as a value that shares its tensors with the bank."""
        member = self._member(name)
        sites = {path: self._stands[path].of(name) for path in member.sites}
        modules = {path: dict(self._stands[path].of(name).named_parameters()) for path in member.modules}
        tokens = {path: self._stands[path].of(name) for path in member.tokens}
        return Adapter(member.spec, sites, modules, tokens=tokens, nested=member.nested)

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """An adapter's parameters, named as in `Adapter.tensors`; those of sites, of modules and of tokens in turn."""
        for path in self._member(name).paths:
            for part, parameter in self._stands[path].of(name).named_parameters():
                yield f"{path}.{part}", parameter

    def _member(self, name: str) -> Member:
        if name not in self._members:
            held = ", ".join(self._members) or "none"
            raise BankError(f"no adapter {name!r}{nearest(str(name), self.names)}", hint=f"the bank holds: {held}")
        return self._members[name]

    # ── adding and removing ──────────────────────────────────────────────────────────────────────────────────────

    def add(self, name: str, spec: LoraSpec, seed: int = 0) -> None:
        """Adds a fresh adapter; every site draws from its own generator, seeded by `seed` and the site's path.

        Raises:
            BankError: the name is taken or is none, an adapter is merged, or another adapter trains a target whole.
            TargetError: the spec's targets or patterns match nothing, or its tokens do not fit.
        """
        chosen = choose_sites(spec, self.sites, tuple(self.modules))
        copied = choose_modules(spec.modules_to_save, chosen, self.modules)
        factors = {}
        for site in chosen:
            generator = torch.Generator().manual_seed(mixed(seed, crc32(site.path.encode())))
            factors[site.path] = begun(spec, site, generator)
        tokens = self.vocabulary.begun(spec)
        self._hold(name, Adapter(spec, factors, {path: {} for path in copied}, tokens=tokens), seed)

    def put(self, name: str, adapter: Adapter, seed: int = 0) -> None:
        """Adds an adapter that exists already, a copy of it; `seed` is for dropout.

        Raises:
            BankError: as `add`.
            AdapterMismatchError: lists every part that does not fit this model.
        """
        own = {path: copy.deepcopy(factors).float() for path, factors in adapter.sites.items()}
        self.take(name, replace(adapter, sites=own), seed)

    def take(self, name: str, adapter: Adapter, seed: int = 0) -> None:
        """As `put`, of an adapter in float32 that nobody else has: its factors are the bank's now, none is copied."""
        named = {path: site for site in self.sites.values() for path in (site.path, *site.aliases)}
        check_fits(adapter, named, self.modules, self.vocabulary)
        given = {named[path].path: one for path, one in adapter.sites.items()}
        factors = {path: given[path] for path in self.sites if path in given}
        self._hold(name, replace(adapter, sites=factors, tokens=self.vocabulary.brought(adapter)), seed)

    def load(self, name: str, folder: str | Path, *, rank: int | None = None, force: bool = False) -> None:
        """Adds an adapter from a folder in PEFT's format, ours or anyone's; a nested one at a `rank`, if one is given.

        Warns:
            RankwiseWarning: its ΔW is zero everywhere; it changes nothing.

        Raises:
            AdapterFileError: a file is missing, damaged, or asks for what is not known.
            AdapterMismatchError: parts that do not fit this model (all listed), or, unless `force`, another base.
            SpecError: a rank that the adapter has not, or of one that is not nested.
        """
        folder = Path(folder)
        adapter = read_adapter(folder)
        if not force:
            self.identity.check(folder, adapter)
        self.take(name, adapter if rank is None else adapter.prefix(rank))
        held = self._members[name]
        factors = (self._stands[path].of(name) for path in held.sites)
        if not held.modules and not held.tokens and all(one.changes_nothing() for one in factors):
            warnings.warn(f"{folder}: ΔW is zero at every site; the adapter changes nothing", RankwiseWarning, 2)

    def save(self, name: str, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Writes an adapter as a PEFT folder plus rankwise.json, with `facts` of the run; read back and compared.

        Warns:
            RankwiseWarning: some of its sites change something and some do not, as where training went past them; or
                PEFT would not apply some as they are here (convolutions with dilation or another padding than zeros).

        Raises:
            AdapterFileError: a tensor is not finite, or the disk gave back other bytes.
        """
        adapter, folder = self.adapter(name).plain(), Path(folder)
        kinds = {path: self.sites[path].kind.name for path in adapter.sites}
        model = str(getattr(getattr(self.model, "config", None), "_name_or_path", ""))
        write_adapter(folder, adapter, kinds, tuple(self.modules), model, task_of(self.model))
        known = self.vocabulary.known_without(adapter.tokens)
        base = {"name": model, "fingerprint": self.identity.beside(adapter.modules, known), "storage": self.storage}
        write_record(folder, describe(adapter, base | {"vocabulary": known}, dict(facts or {})))
        warn_of_sites(name, adapter, self.sites)

    def remove(self, name: str) -> None:
        """Takes an adapter out; layers that hold no other are put back as they were."""
        member = self._member(name)
        self._check_unmerged(f"remove {name!r}")
        del self._members[name]
        self._withdraw(name, member.held)

    def _withdraw(self, name: str, paths: Iterable[str]) -> None:
        for path in paths:
            stand = self._stands.get(path)
            if stand is None:
                continue
            stand.dismiss(name)
            if not stand.adapters:
                self._place(path, stand.base)
                del self._stands[path]
        self.vocabulary.reach(self._token_layers)
        if not self._members:
            self._let_go()

    @property
    def stands(self) -> Mapping[str, Stand]:
        """What stands in the place of a module of the base, by path."""
        return MappingProxyType(self._stands)

    @property
    def _token_layers(self) -> list[TokenLayer]:
        return [stand for stand in self._stands.values() if isinstance(stand, TokenLayer)]

    def _let_go(self) -> None:
        """What holding did to the model beside the stands is undone."""
        self.router.unwatch()
        for path, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._flags[path])

    def close(self) -> None:
        """Unmerges and removes everything: the model is bit for bit what it was."""
        if self._merged is not None:
            self.unmerge()
        for name in self.names:
            self.remove(name)

    def _hold(self, name: str, adapter: Adapter, seed: int) -> None:
        if checked_name(name) in self._members:
            raise BankError(f"the bank already holds an adapter {name!r}", hint="remove it or choose another name")
        self._check_unmerged(f"add {name!r}")
        tables = self.vocabulary.tables(adapter.tokens)
        check_apart(adapter, tables, self._members.values(), [layer.path for layer in self._token_layers])
        _ = self.base_fingerprint, self.sites, self.modules  # of the clean model, before it is changed
        if not self._members:
            named = self.model.named_parameters(remove_duplicate=False)
            self._flags = {path: parameter.requires_grad for path, parameter in named}
        held = (*adapter.sites, *adapter.modules, *tables)
        try:
            self._admit(name, adapter, tables, seed)
        except BaseException:  # out of memory, an interrupt: nothing stays half held
            self._withdraw(name, held)
            raise
        sites, modules, tokens = map(tuple, (adapter.sites, adapter.modules, adapter.tokens))
        self._members[name] = Member(adapter.spec, sites, modules, tokens, held, adapter.nested)

    def _admit(self, name: str, adapter: Adapter, tables: Mapping[str, TokenRows], seed: int) -> None:
        if not self._members:
            self.model.requires_grad_(False)
        for path, factors in adapter.sites.items():
            stand = self._stands.get(path) or AdaptedLayer(self.sites[path], self.router, crc32(path.encode()))
            self._placed(path, stand).admit(name, factors, seed)
        for path, tensors in adapter.modules.items():
            stand = self._stands.get(path) or CopiedLayer(path, self.modules[path], self.router)
            self._placed(path, stand).admit(name, tensors, seed)
        for path, rows in tables.items():
            stand = self._stands.get(path) or self.vocabulary.stand(path, self.router)
            self._placed(path, stand).admit(name, rows, seed)
        self.vocabulary.reach(self._token_layers)

    def _placed(self, path: str, stand: Stand) -> Stand:
        """The same, in its place."""
        if path not in self._stands:
            self.router.watch(self.model, path)
            self._stands[path] = stand
            self._place(path, stand)
        return stand

    def _place(self, path: str, module: nn.Module) -> None:
        site = self.sites.get(path)
        for place in (path, *(site.aliases if site else ())):
            parent, _, leaf = place.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, module)

    # ── routing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def mix(self, weights: Mapping[str, float]) -> Mix:
        """Adapters in a weighted sum, base(x) + Σ weight · ΔW·x; it stands in `use`, `route`, `stream` for a name.

        Raises:
            BankError, RouteError: an adapter is not there, or is no term of a sum; there is no weight, or none that is.
        """
        mix = Mix.of(weights)
        self._check_routed(Route.whole(mix))
        return mix

    def prefix(self, name: str, rank: int) -> Prefix:
        """The first directions of an adapter of form `lora`; it stands in `use`, `route`, `stream` for a name.

        Raises:
            BankError: the adapter is not there.
            SpecError: its first directions are no adapter by themselves.
        """
        self.adapter(name).check_divisible(name)
        return Prefix(name, rank, self._member(name).spec.scaling)

    def nest(self, name: str, ranks: tuple[int, ...]) -> None:
        """Says at which ranks an adapter has been trained, of which every prefix is one."""
        self._members[name] = replace(self._member(name), nested=ranks)

    def use(self, name: Way) -> AbstractContextManager[None]:
        """Everything through one adapter, or a mix, or through the bare base (None)."""
        return self._routed(Route.whole(name))

    def route(self, names: Sequence[Way], tick: int | None = None) -> AbstractContextManager[None]:
        """Row by row of a batch; None is the bare base.  `tick` numbers the pass, for dropout; None counts on."""
        return self._routed(Route.rows(names), tick)

    def stream(self, runs: Iterable[tuple[Way, int]], tick: int | None = None) -> AbstractContextManager[None]:
        """Token by token of a packed stream, in runs of `(adapter, tokens)`; `tick` as in `route`."""
        return self._routed(Route.tokens(runs), tick)

    def _routed(self, route: Route, tick: int | None = None) -> AbstractContextManager[None]:
        self._check_routed(route)
        return self.router.set(route, tick)

    def _check_routed(self, route: Route) -> None:
        for name in route.members:
            self._member(str(name))
        check_mixes(route, self._members)

    # ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────

    def merge(self, name: str) -> MergeReport:
        """Merges one adapter into the base in memory, proved layer by layer; the originals are kept for `unmerge`.

        Raises:
            MergeError: a merged layer differs from base + adapter; everything has been put back.
            BankError: another adapter is merged.
        """
        member = self._member(name)
        self._check_unmerged(f"merge {name!r}")
        layers = [stand for path in member.sites if isinstance(stand := self._stands[path], AdaptedLayer)]
        self._merged = Merged(name, layers)
        self.router.merged = name
        return self._merged.report

    def unmerge(self) -> None:
        """Puts the original weights back.

        Raises:
            BankError: nothing is merged.
        """
        if self._merged is None:
            raise BankError("no adapter is merged", hint="bank.merge(name) merges one")
        self._merged.undo()
        self._merged = self.router.merged = None

    def bake(self, name: str) -> MergeReport:
        """Merges one adapter for good and lets go of the model, which is then an ordinary one, larger by nothing.

        Adapters are dropped, originals forgotten; an embedding and a head that were tied and now differ are declared
        untied in the model's config.

        Raises:
            BankError: the base is held in codes: rounding to them again would take most of the adapter away.
        """
        if self.storage != "dense":
            raise BankError(
                f"the base is held in {self.storage}; merged into its codes, most of an adapter would be rounded away",
                hint="load the base dense to merge for good; bank.merge and bank.unmerge work in any storage",
            )
        report = self.merge(name)
        layers = self._token_layers
        for path, stand in self._stands.items():
            if isinstance(stand, CopiedLayer):
                stand.settle(name)
            self._place(path, stand.base)
        self._stands, self._members = {}, {}
        self._merged = self.router.merged = None
        self._let_go()
        self.vocabulary.settle(layers, name)
        self.renew()
        declare_untied(self.model)
        return report

    def renew(self) -> None:
        """Forgets what was known of a base that is no more: its weights are others now."""
        for cached in ("identity", "sites", "modules", "vocabulary"):
            self.__dict__.pop(cached, None)

    def _check_unmerged(self, what: str) -> None:
        if self._merged is not None:
            raise BankError(f"cannot {what} while {self._merged.name!r} is merged", hint="bank.unmerge() first")
