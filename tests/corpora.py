"""Small corpora of random tokens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from rankwise.data.corpus import Corpus
from rankwise.data.examples import Examples
from rankwise.data.laid import Labelled, Masked, Pairs
from rankwise.data.pictures import Look, Pictures
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


# ── of other tasks ───────────────────────────────────────────────────────────────────────────────────────────────────


def random_labelled(lengths: list[int], seed: int = 0, classes: int = 3, *, paired: bool = False) -> Labelled:
    """Texts of these lengths; of pairs the second half is the second text."""
    corpus = random_corpus([length + 1 for length in lengths], seed)
    second = np.zeros(len(corpus.tokens), dtype=np.bool_)
    tokens = corpus.tokens.copy()
    tokens[corpus.bounds[1:] - 1] = np.random.default_rng(seed).integers(classes, size=len(lengths))
    for begin, end in zip(corpus.bounds[:-1], corpus.bounds[1:], strict=True):
        second[(begin + end) // 2 : end - 1] = paired
        second[end - 1] = True
    laid = Corpus(tokens, second, corpus.bounds, corpus.origins, corpus.files)
    return Labelled(laid, tuple(f"class {number}" for number in range(classes)))


def random_pairs(lengths: list[tuple[int, int]], seed: int = 0) -> Pairs:
    """Sources and targets of these lengths."""
    corpus = random_corpus([source + target for source, target in lengths], seed)
    mask = np.repeat([False, True] * len(lengths), [part for pair in lengths for part in pair])
    return Pairs(Corpus(corpus.tokens, mask, corpus.bounds, corpus.origins, corpus.files))


def random_masked(lengths: list[int], seed: int = 0) -> Masked:
    """Texts of these lengths whose first and last token may not be hidden."""
    corpus = random_corpus(lengths, seed)
    free = np.ones(len(corpus.tokens), dtype=np.bool_)
    free[corpus.bounds[:-1]] = free[corpus.bounds[1:] - 1] = False
    return Masked(Corpus(corpus.tokens, free, corpus.bounds, corpus.origins, corpus.files), 5, VOCAB, seed)


def random_pictures(count: int, seed: int = 0, classes: int = 5) -> Pictures:
    generator = np.random.default_rng(seed)
    processor = SimpleNamespace(
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.to_dict = lambda: {"image_mean": 0.5}
    pixels = generator.integers(256, size=(count, 3, 16, 16)).astype(np.uint8)
    origins = np.stack([np.zeros(count), 1 + np.arange(count)], axis=1).astype(np.int64)
    names = tuple(f"class {number}" for number in range(classes))
    return Pictures(pixels, generator.integers(classes, size=count), names, Look(processor, 3, 17), origins, ("p.npz",))


def random_examples(task: str, seed: int = 0) -> Examples:
    """Six documents of different lengths."""
    lengths = [9, 4, 30, 17, 12, 21]
    if task == "image-classification":
        return random_pictures(6, seed)
    if task == "seq2seq":
        return random_pairs(list(zip(lengths, [3, 8, 12, 1, 5, 7], strict=True)), seed)
    return random_labelled(lengths, seed) if task == "sequence-classification" else random_masked(lengths, seed)
