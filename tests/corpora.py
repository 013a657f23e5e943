"""Small corpora of random tokens."""

from __future__ import annotations

import numpy as np

from rankwise.data.corpus import Corpus
from tests.models import VOCAB


def random_corpus(lengths: list[int], seed: int = 0, supervised: float = 0.5) -> Corpus:
    """Documents of these lengths; each has at least one supervised token, and not its first."""
    generator = np.random.default_rng(seed)
    bounds = np.cumsum([0, *lengths])
    tokens = generator.integers(3, VOCAB, size=bounds[-1]).astype(np.int32)
    mask = generator.random(bounds[-1]) < supervised
    mask[bounds[1:] - 1] = True
    mask[bounds[:-1]] = False
    lines = np.stack([np.zeros(len(lengths)), 1 + np.arange(len(lengths))], axis=1)
    return Corpus(tokens, mask, bounds.astype(np.int64), lines.astype(np.int64), ("random.jsonl",))


def alike_corpus(lengths: list[int], shared: list[tuple[int, int, int]], supervised: float = 0.5) -> Corpus:
    """A random corpus in which, for each `(a, b, tokens)`, document b begins with so many tokens of document a."""
    corpus = random_corpus(lengths, supervised=supervised)
    for a, b, tokens in shared:
        corpus.document(b)[0][:tokens] = corpus.document(a)[0][:tokens]
    return corpus


def pattern_corpus(documents: int, seed: int = 0) -> Corpus:
    """Documents that can be learnt: a start token, then its successors, supervised."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(6, 14, size=documents)
    bounds = np.cumsum([0, *lengths])
    starts = generator.integers(3, 20, size=documents)
    offsets = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    tokens = (np.repeat(starts, lengths) + 3 * offsets) % (VOCAB - 3) + 3
    mask = offsets > 0
    lines = np.stack([np.zeros(documents), 1 + np.arange(documents)], axis=1)
    return Corpus(tokens.astype(np.int32), mask, bounds.astype(np.int64), lines.astype(np.int64), ("pattern.jsonl",))
