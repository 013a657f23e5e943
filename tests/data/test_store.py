import json
import tracemalloc

import numpy as np
import pytest

from rankwise.data.store import CorpusWriter, open_corpus, save_corpus
from rankwise.errors import DataError
from tests.data.test_corpus import plain

WHOLE = plain([1, 2, 3], [4, 5])


def test_what_is_saved_is_opened_byte_for_byte_and_mapped(tmp_path):
    save_corpus(WHOLE, tmp_path / "c")
    back, facts = open_corpus(tmp_path / "c")
    for name in ("tokens", "supervised", "bounds", "origins"):
        one, other = getattr(WHOLE, name), getattr(back, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
        assert isinstance(other, np.memmap)
        assert not other.flags.writeable
    assert (back.digest, back.files, facts) == (WHOLE.digest, WHOLE.files, {})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_the_arrays_are_plain_npy_files(tmp_path):
    save_corpus(WHOLE, tmp_path / "c")
    assert np.load(tmp_path / "c" / "tokens.npy").tolist() == [1, 2, 3, 4, 5]
    assert np.load(tmp_path / "c" / "origins.npy").shape == (2, 2)


def damage(name, change):
    def do(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return do


@pytest.mark.parametrize(
    "harm",
    [
        damage("tokens.npy", lambda data: data[:-4]),
        damage("tokens.npy", lambda data: data[:-1] + b"\x7f"),
        damage("supervised.npy", lambda data: b""),
        damage("bounds.npy", lambda data: data + b"\0" * 8),
        damage("manifest.json", lambda data: data[:40]),
        damage("manifest.json", lambda data: b"[]"),
        damage("manifest.json", lambda data: data.replace(b'"schema": 1', b'"schema": 99')),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "origins.npy").unlink(),
    ],
    ids=["short", "flipped", "empty", "long", "half", "list", "schema", "no manifest", "no array"],
)
def test_a_damaged_folder_is_refused_and_can_be_written_again(tmp_path, harm):
    save_corpus(WHOLE, tmp_path / "c")
    harm(tmp_path / "c")
    with pytest.raises(DataError, match="c"):
        open_corpus(tmp_path / "c")
    save_corpus(WHOLE, tmp_path / "c")
    assert open_corpus(tmp_path / "c")[0].digest == WHOLE.digest


def test_there_is_no_corpus_in_an_empty_place(tmp_path):
    with pytest.raises(DataError, match="not a stored corpus"):
        open_corpus(tmp_path / "nothing")


def test_nothing_is_left_of_what_was_not_finished(tmp_path):
    def interrupted():
        with CorpusWriter(tmp_path / "c") as writer:
            writer.append(np.array([1, 2]), np.array([False, True]), (0, 1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with CorpusWriter(tmp_path / "d"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_was_opened_stays_readable_when_the_entry_is_replaced(tmp_path):
    save_corpus(WHOLE, tmp_path / "c")
    back, _ = open_corpus(tmp_path / "c")
    save_corpus(plain([9]), tmp_path / "c")
    assert back.tokens.tolist() == [1, 2, 3, 4, 5]
    assert open_corpus(tmp_path / "c")[0].tokens.tolist() == [9]


def test_a_whole_entry_is_left_to_whoever_reads_it(tmp_path):
    """Two processes make the same entry: the second to finish may meet the first one while it opens its own."""
    save_corpus(WHOLE, tmp_path / "c")
    before = {path.name: path.stat().st_ino for path in (tmp_path / "c").iterdir()}
    save_corpus(WHOLE, tmp_path / "c")
    assert {path.name: path.stat().st_ino for path in (tmp_path / "c").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_facts_are_kept(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        writer.append(np.array([1, 2]), np.array([False, True]), (0, 12))
        writer.finish(["数据.jsonl"], {"rows": 3})
    corpus, facts = open_corpus(tmp_path / "c")
    assert facts == {"rows": 3}
    assert corpus.origin(0) == "数据.jsonl:12"
    assert json.loads((tmp_path / "c" / "manifest.json").read_text(encoding="utf-8"))["schema"] == 1


def test_memory_does_not_grow_with_the_documents(tmp_path):
    def peak(count) -> int:
        tokens, mask = np.arange(1000, dtype=np.int32), np.ones(1000, dtype=np.bool_)
        tracemalloc.start()
        with CorpusWriter(tmp_path / str(count)) as writer:
            for i in range(count):
                writer.append(tokens, mask, (0, i))
            writer.finish(["a"], {})
        corpus, _ = open_corpus(tmp_path / str(count))
        assert len(corpus) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(5000) < 3_000_000  # of 25 MB; files are hashed in blocks of 1 MiB
