import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.corpus import Corpus

FILES = ("a.jsonl", "b.csv")


def corpus(*documents, files=FILES):
    """Documents given as lists of (token, supervised)."""
    flat = [pair for document in documents for pair in document]
    return Corpus(
        np.array([token for token, _ in flat], dtype=np.int32),
        np.array([mask for _, mask in flat], dtype=np.bool_),
        np.cumsum([0, *map(len, documents)]).astype(np.int64),
        np.array([(i % len(files), i + 1) for i in range(len(documents))], dtype=np.int64).reshape(-1, 2),
        files,
    )


def plain(*documents):
    return corpus(*([(token, place > 0) for place, token in enumerate(document)] for document in documents))


documents = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=8
)


@given(documents=documents, data=st.data())
def test_documents_come_back_whole_whatever_is_chosen(documents, data):
    whole = corpus(*documents)
    chosen = data.draw(st.lists(st.integers(0, len(documents) - 1), max_size=10))
    part = whole.subset(chosen)
    assert len(part) == len(chosen)
    for place, i in enumerate(chosen):
        tokens, supervised = part.document(place)
        assert list(zip(tokens.tolist(), supervised.tolist(), strict=True)) == documents[i]
        assert part.origin(place) == whole.origin(i)
    assert part.lengths().tolist() == [len(documents[i]) for i in chosen]
    assert part.supervised_counts().tolist() == [sum(mask for _, mask in documents[i]) for i in chosen]
    assert part.tokens.dtype == np.int32
    assert part.bounds.dtype == part.lengths().dtype == part.supervised_counts().dtype == np.int64


def test_a_subset_is_a_copy_and_a_document_a_view():
    whole = plain([1, 2], [3])
    assert not np.shares_memory(whole.subset([0, 1]).tokens, whole.tokens)
    assert np.shares_memory(whole.document(1)[0], whole.tokens)


def test_where_a_document_stands():
    assert [plain([1], [2], [3]).origin(i) for i in range(3)] == ["a.jsonl:1", "b.csv:2", "a.jsonl:3"]


def test_the_digest_is_of_what_is_trained_on():
    base = corpus([(1, False), (2, True)], [(3, False)])
    assert corpus([(1, False), (2, True)], [(3, False)], files=("z", "y")).digest == base.digest
    others = [
        corpus([(1, False), (2, False)], [(3, False)]),
        corpus([(1, False), (9, True)], [(3, False)]),
        corpus([(1, False)], [(2, True), (3, False)]),
        corpus([(3, False)], [(1, False), (2, True)]),
        base.subset([0]),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 6


@pytest.mark.parametrize("chosen", [[], np.array([], dtype=np.int64)])
def test_nothing_chosen_is_an_empty_corpus(chosen):
    empty = plain([1, 2]).subset(chosen)
    assert len(empty) == 0
    assert empty.lengths().tolist() == empty.supervised_counts().tolist() == []
    assert empty.digest
