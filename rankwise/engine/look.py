"""Starts that are found in documents, `eva` and `lora_ga`: which documents, which layers, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.directions import random_directions
from rankwise.adapters.dropout import mixed
from rankwise.adapters.lowrank import LowRank
from rankwise.adapters.scaling import alpha_for
from rankwise.adapters.spec import LoraSpec, exactly
from rankwise.adapters.starts import gradient_start
from rankwise.data.corpus import Corpus
from rankwise.data.examples import Examples
from rankwise.data.order import Order, micro_batches
from rankwise.engine.forward import Forward
from rankwise.engine.gradient import gradient_triplets
from rankwise.engine.run import Start
from rankwise.engine.trainee import check_can_learn
from rankwise.engine.variance import most_varying
from rankwise.errors import DataError, SpecError, listing
from rankwise.planning.limits import MICRO_TOKENS
from rankwise.surgery.bank import Bank
from rankwise.surgery.begin import drawn, made, whole_modules
from rankwise.surgery.sites import Site, choose_sites

Spectrum = Literal["activations", "gradients"]
_SEARCHED, _LEAST = 4, 8  # directions for each rank, as LoRA-GA's authors do, and in all


@dataclass(frozen=True)
class Found:
    """An adapter as it begins, and the counts of `Begun`."""

    adapter: Adapter
    documents: int
    changed: int
    unsettled: int
    unreached: int


class Look:
    """A look at documents, for one adapter.

    Args:
        name: under which it will be in the bank; the probe has it meanwhile.
        corpus, seed, start: what is looked at: the documents that training with this seed meets first.
        advance: is told how far it is, from 0 to 1.

    Raises:
        SpecError: the documents are for another task than a causal language model's.
        DataError: no documents, or nothing supervised in those that are looked at.
        TargetError: the spec's targets or patterns match nothing, or its tokens do not fit.
    """

    def __init__(
        self,
        bank: Bank,
        name: str,
        spec: LoraSpec,
        corpus: Examples,
        seed: int,
        start: Start,
        advance: Callable[[float], None],
    ) -> None:
        if not isinstance(corpus, Corpus):
            said = f"init {spec.init!r} looks at documents as a causal language model reads them"
            raise SpecError(f"{said}, and these are for another task", hint="take another init")
        self.bank, self.name, self.spec, self.corpus, self.seed, self.start = bank, name, spec, corpus, seed, start
        self.advance = advance
        if not len(corpus):
            raise DataError("there is nothing to look at: no documents")
        self.sites = {site.path: site for site in choose_sites(spec, bank.sites, tuple(bank.modules))}
        self.modules = whole_modules(spec, bank.sites, bank.modules)
        self.tokens = bank.vocabulary.begun(spec)
        lengths = corpus.lengths()
        self.documents = Order(lengths, seed, 1, start.documents).epoch(0)[0]
        self.supervised = int(corpus.supervised_counts()[self.documents].sum())
        micro = start.micro_tokens or MICRO_TOKENS.get(bank.model.device.type, 8192)
        self.batches = micro_batches(self.documents, lengths, micro)
        if not self.supervised:
            raise DataError(f"nothing is supervised in the {len(self.documents)} documents that are looked at")

    # ── eva ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def varying(self) -> Found:
        """A: where the inputs vary most; B: zero; the ranks given out anew, each layer's scale as it was.

        Raises:
            SpecError: layers that are not linear or narrower than their rank (all listed), one that is not given
                every token, or ranks of single layers that would be given out anew.
            DataError: fewer supervised tokens than directions.
        """
        self._check_varying()
        ranks = {path: self.spec.rank_at(path) for path in self.sites}
        asked = {path: (rank, self._most(rank, self.sites[path])) for path, rank in ranks.items()}
        with self._probing(dict.fromkeys(self.sites, 1)) as forward:
            found = most_varying(forward, self.name, asked, self.corpus, self.batches, self.seed, self.advance)
        given = {path: len(found.directions.get(path, ())) or rank for path, rank in ranks.items()}
        spec = self._given(given)
        factors = {}
        for path, A in found.directions.items():
            factors[path] = A.cpu().float().contiguous(), torch.zeros(self.sites[path].shape.factor_shapes(len(A))[1])
        changed = sum(given[path] != rank for path, rank in ranks.items())
        return self._made(spec, factors, found.documents, changed, found.unsettled)

    def _most(self, rank: int, site: Site) -> int:
        return max(rank, min(round(self.start.rho * rank), site.shape.inputs))

    def _check_varying(self) -> None:
        spec = self.spec
        if spec.rank_pattern and self.start.rho > 1:
            raise SpecError(
                "init 'eva' gives out the ranks itself, and rank_pattern does too",
                hint="leave out rank_pattern, or say rho=1 and every layer keeps the rank it is given",
            )
        self._check_linear()
        narrow = [
            f"{path}: rank {spec.rank_at(path)} of inputs {site.shape.inputs} wide"
            for path, site in self.sites.items()
            if site.kind.width_dims == 1 and spec.rank_at(path) > site.shape.inputs
        ]
        if narrow:
            raise SpecError(
                f"init 'eva' takes as many directions as the rank out of the inputs of layers:\n{listing(narrow)}",
                hint="lower their rank, leave these layers out of the targets, or take another init",
            )
        most = max(spec.rank_at(path) for path in self.sites)
        if self.supervised <= most:
            raise DataError(
                f"{self.supervised} supervised tokens in the {len(self.documents)} documents that are looked at are "
                f"too few for rank {most}",
                hint="look at more documents, or lower the rank",
            )

    def _check_linear(self) -> None:
        kinds = [f"{path}: {s.kind.name}" for path, s in self.sites.items() if s.kind.width_dims != 1]
        if kinds:
            raise SpecError(
                f"the inputs of linear layers alone are looked at, and these are other layers:\n{listing(kinds)}",
                hint="leave these layers out of the targets, or take another init",
            )

    def _given(self, ranks: Mapping[str, int]) -> LoraSpec:
        """The spec with these ranks, and alphas with which every scale stays what it was."""
        spec = self.spec
        alphas = {p: alpha_for(spec.scaling, spec.alpha_at(p), spec.rank_at(p), rank) for p, rank in ranks.items()}
        ranks = {exactly(path): rank for path, rank in ranks.items() if rank != spec.rank}
        alphas = {exactly(path): alpha for path, alpha in alphas.items() if alpha != spec.alpha}
        return spec.model_copy(update={"rank_pattern": ranks, "alpha_pattern": alphas})

    # ── lora_ga ──────────────────────────────────────────────────────────────────────────────────────────────────

    def pulled(self) -> Found:
        """A and B out of the gradient of the loss by the frozen weight.

        Raises:
            SpecError: layers too small for twice their rank (all listed), or a model in float16.
        """
        check_can_learn(self.bank)
        ranks = {path: self.spec.rank_at(path) for path in self.sites}
        small = [
            f"{path}: 2 × {ranks[path]} of {min(_sides(site))}"
            for path, site in self.sites.items()
            if 2 * ranks[path] > min(_sides(site))
        ]
        if small:
            raise SpecError(
                f"init 'lora_ga' takes twice the rank out of a gradient, and so much these do not have:\n"
                f"{listing(small)}",
                hint="a lower rank there (rank_pattern), or another init",
            )
        searched = {path: min(max(_SEARCHED * ranks[path], _LEAST), *_sides(site)) for path, site in self.sites.items()}
        with self._probing(searched) as forward:
            found = gradient_triplets(forward, self.name, self.corpus, self.batches, self.advance)
        factors = {}
        for path, (left, _, right) in found.items():
            both = 2 * ranks[path]
            factors[path] = gradient_start(left[:, :both].cpu(), right[:both].cpu(), self.sites[path].shape)
        return self._made(self.spec, factors, len(self.documents))

    # ── spectra ──────────────────────────────────────────────────────────────────────────────────────────────────

    def worths(self, by: Spectrum, most: int) -> dict[str, list[float]]:
        """What each further direction of a layer is worth, the first the most; `most` of them, or all there are.

        By `activations` the share of its input's variance (EVA, arXiv:2410.07170); by `gradients` the squared singular
        values of the loss's gradient by the frozen weight, which is what a first step along them gains.

        Raises:
            SpecError: by activations, layers that are not linear (all listed); by gradients, a model in float16.
        """
        widths = {path: min(most, *_sides(site)) for path, site in self.sites.items()}
        if by == "activations":
            self._check_linear()
            asked = {path: (1, width) for path, width in widths.items()}
            with self._probing(dict.fromkeys(self.sites, 1)) as forward:
                found = most_varying(forward, self.name, asked, self.corpus, self.batches, self.seed, self.advance)
            return found.shares
        check_can_learn(self.bank)
        searched = {
            path: min(max(_SEARCHED * width, _LEAST), *_sides(self.sites[path])) for path, width in widths.items()
        }
        with self._probing(searched) as forward:
            triplets = gradient_triplets(forward, self.name, self.corpus, self.batches, self.advance)
        return {path: values[: widths[path]].square().tolist() for path, (_, values, _) in triplets.items()}

    # ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _probing(self, ranks: Mapping[str, int]) -> Iterator[Forward]:
        """The engine's hold on the model with a probe in every site: A drawn, orthonormal rows, and B zero.

        It has the rows of tokens too, without which the model may not know all that is in the documents.
        """
        probes = {}
        for path, site in self.sites.items():
            shape_A, shape_B = site.shape.factor_shapes(ranks[path])
            rows = random_directions(ranks[path], _sides(site)[1], self._chance(path))
            probes[path] = LowRank(rows.reshape(shape_A), torch.zeros(shape_B), 1.0)
        self.bank.put(self.name, Adapter(LoraSpec(targets=self.spec.targets), probes, tokens=self.tokens))
        try:
            with Forward(self.bank, checkpointing=self.start.checkpointing) as forward:
                yield forward
        finally:
            self.bank.remove(self.name)

    def _made(
        self,
        spec: LoraSpec,
        found: Mapping[str, tuple[Tensor, Tensor]],
        documents: int,
        changed: int = 0,
        unsettled: int = 0,
    ) -> Found:
        chance = {path: self._chance(path) for path in self.sites}
        sites = {
            path: made(spec, site, *(found.get(path) or drawn(spec, site, chance[path])))
            for path, site in self.sites.items()
        }
        adapter = Adapter(spec, sites, self.modules, tokens=self.tokens)
        return Found(adapter, documents, changed, unsettled, len(self.sites) - len(found))

    def _chance(self, path: str) -> torch.Generator:
        """A site's own, as `bank.add` has it."""
        return torch.Generator().manual_seed(mixed(self.seed, crc32(path.encode())))


def _sides(site: Site) -> tuple[int, int]:
    """Of the weight as a matrix `[O, I]`, a kernel counted with the inputs."""
    return site.shape.outputs, site.shape.inputs * torch.Size(site.shape.kernel).numel()
