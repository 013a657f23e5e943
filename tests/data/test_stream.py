"""A stream says the same as its documents one by one, whatever they share."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.data.corpus import Corpus
from rankwise.data.stream import LEAST_SHARED, lay


@st.composite
def corpora(draw) -> tuple[Corpus, list[int]]:
    """Documents that begin with one of a few beginnings, which begin alike themselves, and groups of them."""
    begin = draw(st.lists(st.integers(0, 1), min_size=0, max_size=40))
    stems = [begin, begin + [2] * 20, begin + [2] * 20 + [3] * 30, [4] * 17]
    documents, masks = [], []
    for _ in range(draw(st.integers(1, 7))):
        tokens = draw(st.sampled_from(stems)) + draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
        documents.append(tokens)
        masks.append([False, *(draw(st.booleans()) for _ in tokens[1:])])
    bounds = np.cumsum([0, *map(len, documents)])
    tokens, mask = np.concatenate(documents).astype(np.int32), np.concatenate(masks).astype(np.bool_)
    origins = np.zeros((len(documents), 2), dtype=np.int64)
    cut = draw(st.integers(0, len(documents)))
    return Corpus(tokens, mask, bounds, origins, ("x",)), [size for size in (cut, len(documents) - cut) if size]


def chain(stream, segment: int) -> list[int]:
    found = [segment]
    while stream.after[found[0]] >= 0:
        found.insert(0, stream.after[found[0]])
    return found


def read(stream, segment: int, array: np.ndarray) -> list[int]:
    return [int(x) for s in chain(stream, segment) for x in array[stream.bounds[s] : stream.bounds[s + 1]]]


@given(corpora())
@settings(max_examples=200, deadline=None)
def test_every_document_can_be_read_again(case):
    corpus, runs = case
    stream = lay(corpus, range(len(corpus)), runs)
    leaves = [s for s in range(len(stream.after)) if s not in stream.after]
    assert sorted(stream.holders[s] for s in leaves) == list(range(len(corpus)))
    group = np.repeat(range(len(runs)), runs)
    for segment in leaves:
        own = stream.holders[segment]
        assert read(stream, segment, stream.tokens) == corpus.document(own)[0].tolist()
        assert read(stream, segment, stream.positions) == list(range(len(corpus.document(own)[0])))
        assert {group[stream.holders[s]] for s in chain(stream, segment)} == {group[own]}
    for segment, before in enumerate(stream.after):  # segments that continue one follow it at once
        assert before < segment
        assert all(before in chain(stream, s) for s in range(before + 1, segment) if before >= 0)


@given(corpora())
@settings(max_examples=200, deadline=None)
def test_what_predicts_a_supervised_token_is_the_token_before_it(case):
    corpus, runs = case
    stream = lay(corpus, range(len(corpus)), runs)
    want = [
        (document, place - 1, int(tokens[place - 1]), int(tokens[place]))
        for document in range(len(corpus))
        for tokens, mask in [corpus.document(document)]
        for place in np.flatnonzero(mask)
    ]
    got = zip(
        stream.owners, stream.positions[stream.sources], stream.tokens[stream.sources], stream.targets, strict=True
    )
    assert [tuple(map(int, row)) for row in got] == want


def test_a_common_beginning_is_laid_once_and_only_within_a_run():
    stem = list(range(100, 100 + LEAST_SHARED))
    documents = [[*stem, 1, 2], [*stem, 3], [7, 8], [*stem, 1, 2, 5], [*stem, 1, 2]]
    bounds = np.cumsum([0, *map(len, documents)])
    tokens = np.concatenate(documents).astype(np.int32)
    corpus = Corpus(tokens, tokens > 0, bounds, np.zeros((5, 2), dtype=np.int64), ("x",))
    assert lay(corpus, range(5)).size == len(tokens)
    assert lay(corpus, range(5), [5]).size == len(tokens) - 3 * LEAST_SHARED
    assert lay(corpus, range(5), [3, 2]).size == len(tokens) - 2 * LEAST_SHARED - 1
    assert lay(corpus, [0, 0], [2]).size == len(documents[0]) + 1, "equal documents keep a token each"
