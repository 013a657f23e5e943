"""The tokens a model knows: its embedding, its head and what shares their weight; and adapters' rows of these.

A new token's rows begin at the mean of the rows before it.  In the softmax it then weighs no more than the mean of the
others, exp being convex, so that n new tokens beside V raise the loss on these by log(1 + n/V) at most (J. Hewitt,
"Initializing New Word Embeddings for Pretrained Language Models", 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.spec import LoraSpec
from rankwise.adapters.tokens import TokenRows
from rankwise.errors import TargetError, listing
from rankwise.surgery.kinds import Layer
from rankwise.surgery.routing import Router
from rankwise.surgery.sites import Site
from rankwise.surgery.tokens import TokenEmbedding, TokenHead, TokenLayer

_CHUNK = 8192  # rows that are summed at once: a wide copy of a whole matrix may be too large


class Vocabulary:
    """Of a clean model.

    Attributes:
        embedding, head: None where the model has none whose rows could be exchanged.
        twins: sites that share the embedding's weight, itself among them; its rows are theirs, where an adapter has
            no others for them.
        size: tokens that the embedding has rows for.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        self.model: Any = model
        by_module = {id(site.module): site for site in sites.values()}
        found = by_module.get(id(_given(model, "get_input_embeddings")))
        self.embedding = found if found is not None and found.kind.lookup else None
        self.output = _given(model, "get_output_embeddings")
        found = by_module.get(id(self.output))
        self.head = found if found is not None and found.kind.name == "linear" else None
        weight = None if self.embedding is None else self.embedding.module.weight
        self.twins = [site for site in sites.values() if weight is not None and site.module.weight is weight]
        self.size = 0 if self.embedding is None else self.embedding.shape.inputs
        says: list[Any] = [model, model.config.get_text_config()] if isinstance(model, PreTrainedModel) else []
        self._declared = [(one, one.vocab_size) for one in says if hasattr(one, "vocab_size")]

    @property
    def sites(self) -> dict[str, Site]:
        """Where rows can be exchanged, by every path."""
        whole = [*self.twins, *([self.head] if self.head is not None and self.head not in self.twins else [])]
        return {path: site for site in whole for path in (site.path, *site.aliases)}

    @property
    def own(self) -> list[Site]:
        """The embedding, and a head that has a weight of its own."""
        apart = [self.head] if self.head not in self.twins else []
        return [site for site in (self.embedding, *apart) if site is not None]

    def parameters(self) -> set[int]:
        """Ids of the tensors that have a row for each token."""
        return {
            id(p) for site in self.own for p in site.module.parameters(recurse=False) if p.shape[:1] == (self.size,)
        }

    def known_without(self, tokens: Mapping[str, TokenRows]) -> int:
        """How many of its first rows are the model's, though an adapter brings the last ones along."""
        brought = [set(tokens[site.path].tokens) if site.path in tokens else set() for site in self.own]
        known = self.size
        while known and brought and all(known - 1 in ids for ids in brought):
            known -= 1
        return known

    # ── rows of an adapter ───────────────────────────────────────────────────────────────────────────────────────

    def begun(self, spec: LoraSpec) -> dict[str, TokenRows]:
        """Fresh rows for the tokens of a spec, by path.

        Raises:
            TargetError: the model has no such rows, or lacks some before the first new one.
        """
        ids, first = [*spec.trained_tokens, *spec.new_tokens], min(spec.new_tokens, default=self.size)
        if not ids:
            return {}
        absent = [i for i in spec.trained_tokens if i >= self.size]
        problems = [f"trained_tokens {i}: the model has rows for {self.size} tokens" for i in absent]
        problems += ["new_tokens 0: it has no token before it, at whose mean it could begin"] if not first else []
        problems += self.problems({site.path: TokenRows(ids, torch.empty(len(ids), _width(site))) for site in self.own})
        if problems:
            raise TargetError(f"the spec's tokens do not fit the model:\n{listing(problems)}")
        return {site.path: TokenRows(ids, _begin(_weight(site), spec, first)) for site in self.own}

    def problems(self, tokens: Mapping[str, TokenRows]) -> list[str]:
        """Why rows of an adapter do not fit this model, in sentences."""
        if self.embedding is None:
            return [f"{type(self.model).__name__} has no embedding of tokens"]
        found = []
        for path, rows in tokens.items():
            site = self.sites.get(path)
            if site is None:
                found.append(f"{path}: rows of tokens for what is neither embedding nor head here")
            elif rows.width != _width(site):
                found.append(f"{path}: rows of {rows.width} numbers, here {_width(site)}")
            found += [f"{path}: {gap}" for gap in self._gap(rows.tokens)]
        reached = {path: self.sites[path] for path in self.tables(tokens)}
        found += [
            f"{path}: has a bias, for which PEFT's format has no place beside rows"
            for path, site in reached.items()
            if getattr(site.module, "bias", None) is not None
        ]
        return found + (self._fixed() if self._grows(tokens) else [])

    def brought(self, adapter: Adapter) -> dict[str, TokenRows]:
        """An adapter's rows by path, and with them those that its own, larger base had behind them.

        A base is often enlarged by more rows than there are tokens, to a round number; PEFT then stores it whole.
        """
        found = {}
        for path, rows in adapter.tokens.items():
            stored = adapter.expects.get(path, rows.rows[:0])
            more = sorted({*range(self.size, len(stored))} - {*rows.tokens})
            whole = torch.cat([rows.rows.detach(), stored[more].float()])
            found[self.sites[path].path] = TokenRows([*rows.tokens, *more], whole)
        return found

    def _grows(self, tokens: Mapping[str, TokenRows]) -> bool:
        return any(i >= self.size for rows in tokens.values() for i in rows.tokens)

    def _gap(self, ids: Iterable[int]) -> list[str]:
        """A sentence where rows behind the model's last leave some out: another, larger base is meant."""
        behind = sorted(i for i in ids if i >= self.size)
        if behind == list(range(self.size, self.size + len(behind))):
            return []
        return [
            f"token {behind[-1]}: the model has rows for {self.size} tokens and would need {behind[-1] + 1}, of which "
            f"there are only {len(behind)} more"
        ]

    def _fixed(self) -> list[str]:
        """What of a model cannot be enlarged, in sentences."""
        buffers = self.model.named_buffers(recurse=False)
        found = [f"the model's {name} has a place for each token" for name, b in buffers if self.size in b.shape]
        if self.output is not None and self.head is None:
            found.append(f"the model's head is a {type(self.output).__name__}")
        if self.head is not None and self.head.shape.outputs != self.size:
            found.append(f"the model's head knows {self.head.shape.outputs} tokens, its embedding {self.size}")
        return [f"{what}, which cannot be enlarged" for what in found]

    # ── in the model ─────────────────────────────────────────────────────────────────────────────────────────────

    def tables(self, tokens: Mapping[str, TokenRows]) -> dict[str, TokenRows]:
        """Rows for every site that is to have some, by its path.

        Where the vocabulary grows, sites without rows get an empty table: they are enlarged all the same.
        """
        sites, grows = self.sites, self._grows(tokens)
        named = {sites[path].path: rows for path, rows in tokens.items() if path in sites}
        shared = None if self.embedding is None else named.get(self.embedding.path)
        found: dict[str, TokenRows] = {}
        for site in dict.fromkeys(sites.values()):
            rows = named.get(site.path, shared if site in self.twins else None)
            if rows is not None or grows:
                found[site.path] = TokenRows([], torch.empty(0, _width(site))) if rows is None else rows
        return found

    def stand(self, path: str, router: Router) -> TokenLayer:
        site = self.sites[path]
        kind = TokenEmbedding if site.kind.lookup else TokenHead
        return kind(site, router, _mean(_weight(site)))

    def reach(self, layers: Sequence[TokenLayer]) -> None:
        """Enlarges the model for all tokens that adapters in these layers have, or takes that back."""
        size = max((layer.needed for layer in layers), default=self.size)
        for layer in layers:
            layer.reach(size)
        self._declare(size)

    def settle(self, layers: Sequence[TokenLayer], name: str) -> None:
        """Gives the model an adapter's rows for good: new weights, larger by what lies behind; twins stay twins."""
        made: dict[int, nn.Parameter] = {}
        for layer in layers:
            layer.dismiss_but(name)
        self.reach(layers)
        for layer in layers:
            words, key = layer.words(name), id(layer.of(name))
            if words is None:
                continue
            if key not in made:
                made[key] = nn.Parameter(words.onto(layer.base.weight), requires_grad=False)
            layer.base.weight = made[key]
            setattr(layer.base, layer.counts, len(made[key]))
        self._declare(max((len(weight) for weight in made.values()), default=self.size))

    def _declare(self, size: int) -> None:
        """Has the model say how many tokens it knows."""
        for one, declared in self._declared:
            one.vocab_size = declared if size == self.size else size


def declare_untied(model: nn.Module) -> None:
    """Has a model's config say so where its embedding and its head share their weight no more."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or not getattr(config, "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        config.tie_word_embeddings = False


def _given(model: nn.Module, ask: str) -> Any:
    """What a model answers, or None where it does not know."""
    try:
        return getattr(model, ask, lambda: None)()
    except NotImplementedError:
        return None


def _weight(site: Site) -> Tensor:
    layer: Layer = site.module
    weight: Tensor = layer.weight
    return weight


def _width(site: Site) -> int:
    return site.shape.outputs if site.kind.lookup else site.shape.inputs


@torch.no_grad()
def _begin(weight: Tensor, spec: LoraSpec, first: int) -> Tensor:
    """`[N, H]`: trained tokens as they are, new ones at the mean of the rows before the first of them."""
    own = weight[torch.tensor(spec.trained_tokens, dtype=torch.int64, device=weight.device)].float()
    return torch.cat([own, _mean(weight[:first]).repeat(len(spec.new_tokens), 1)])


@torch.no_grad()
def _mean(weight: Tensor) -> Tensor:
    """Of the rows, float32 `[H]`."""
    sums = [part.sum(0, dtype=torch.float64) for part in weight.detach().split(_CHUNK)]
    return (torch.stack(sums).sum(0) / len(weight)).float()
