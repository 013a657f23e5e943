import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rankwise.data.prepare import prepare
from rankwise.data.template import Template
from rankwise.errors import DataError
from tests.data.chat import TEMPLATES, byte_level

CHAT = Template(byte_level(TEMPLATES["generation tags"]))


def write(path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def turns(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


@pytest.fixture
def make(tmp_path):
    """`prepare` on rows, with a cache of its own."""

    def run(rows, name="train.jsonl", template=CHAT, max_length=200, **options):
        path = write(tmp_path / name, rows)
        return prepare(path, template, max_length, cache=tmp_path / "cache", **options)

    return run


def decoded(prepared, i, only_trained=True):
    tokens, mask = prepared.corpus.document(i)
    return "".join(text for text, trained in CHAT.marked(tokens, mask) if trained or not only_trained)


def failure(run, *args, **options) -> str:
    with pytest.raises(DataError) as caught:
        run(*args, **options)
    return str(caught.value)


# What becomes of rows


def test_rows_of_every_shape_become_documents_with_their_origin(make, tmp_path):
    rows = [
        pair("q", "one"),
        {"text": "two"},
        turns("q", "three", "q", "four"),
        {"instruction": "do", "input": "x", "output": "five", "source": "web"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "六"}]},
    ]
    prepared = make(rows)
    assert [prepared.corpus.origin(i) for i in range(5)] == [f"{tmp_path / 'train.jsonl'}:{n}" for n in range(1, 6)]
    assert [decoded(prepared, i) for i in (0, 2, 3, 4)] == [
        "one<|im_end|>",
        "three<|im_end|>four<|im_end|>",
        "five<|im_end|>",
        "六<|im_end|>",
    ]
    report = prepared.report
    assert (report.rows, report.documents, report.truncated, report.dropped) == (5, 5, 0, {})
    assert report.tokens == len(prepared.corpus.tokens)
    assert report.supervised == prepared.corpus.supervised.sum()
    assert report.shapes == {"completion": 1, "text": 1, "messages": 1, "instruction": 1, "conversations": 1}
    assert report.unused == {"source": 1}
    assert json.loads(json.dumps(report.to_json())) == report.to_json()


def test_no_document_has_a_trained_first_token_or_an_untrained_last_one(make):
    prepared = make([{"text": "hello world"}, turns("a", "b"), pair("", "c")])
    for i in range(len(prepared.corpus)):
        _, mask = prepared.corpus.document(i)
        assert not mask[0]
        assert mask[-1]


def test_one_row_and_rows_all_alike(make):
    assert len(make([pair("q", "a")]).corpus) == 1
    assert len(make([pair("q", "a")] * 7).corpus) == 7


def test_overlong_rows_are_cut_at_their_end_or_left_out_and_counted(make):
    rows = [pair("q", "short"), pair("q", "a long answer " * 40)]
    cut = make(rows, max_length=60)
    assert (cut.report.documents, cut.report.truncated, cut.report.dropped) == (2, 1, {})
    assert cut.corpus.lengths().max() == 60
    left_out = make(rows, max_length=60, overlong="drop")
    assert (left_out.report.documents, left_out.report.truncated) == (1, 0)
    assert left_out.report.dropped == {"longer than max_length": 1}


def test_a_document_of_exactly_max_length_is_neither_cut_nor_left_out(make):
    length = len(make([pair("q", "answer")]).corpus.tokens)
    for policy in ("truncate", "drop"):
        report = make([pair("q", "answer")], max_length=length, overlong=policy).report
        assert (report.documents, report.truncated) == (1, 0)
    assert make([pair("q", "answer")], max_length=length - 1).report.truncated == 1


def test_rows_with_nothing_to_train_are_left_out_and_counted(make):
    rows = [
        pair("q", "a"),
        {"messages": [{"role": "user", "content": "no answer"}]},
        turns("q", "a")
        | {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]},
        pair("long question " * 60, "a"),
    ]
    report = make(rows, max_length=60).report
    assert report.documents == 1
    assert report.dropped == {"no assistant turn to train": 2, "no trained token within max_length": 1}


def test_prompts_that_fill_every_document_stop_the_run_with_counts(make):
    text = failure(make, [pair("long question " * 60, "a")] * 3, max_length=32)
    assert "nothing is left to train on of 3 rows: 3 × no trained token within max_length" in text
    assert "raise max_length (it is 32)" in text


@pytest.mark.parametrize(
    ("rows", "said"),
    [([], "there is not one row"), ([{"messages": [{"role": "user", "content": "x"}]}], "no assistant turn")],
)
def test_nothing_at_all_stops_the_run(make, rows, said):
    assert said in failure(make, rows)


def test_a_text_of_one_token_teaches_nothing():
    """Without EOS behind it there would be nothing to predict; with it, EOS is."""
    (document,) = CHAT.render(__import__("rankwise.data.conversations", fromlist=["Text"]).Text("a"))
    assert document.supervised.tolist() == [False, True]


def test_bad_rows_of_all_kinds_and_files_are_listed_together(tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_bytes(
        b'{"prompt": "q", "completion": "a"}\n{broken\n{"text": 5}\n{"text": "\xc4\xe3"}\n{"question": "q"}\n'
    )
    two = write(tmp_path / "two.jsonl", [turns("q", ""), {"messages": [{"role": "boss", "content": "x"}]}])
    with pytest.raises(DataError) as caught:
        prepare([one, two], CHAT, 100, cache=tmp_path / "cache")
    text = str(caught.value)
    assert text.startswith("6 problems in the data:")
    for place in (
        "one.jsonl:2: not JSON",
        "one.jsonl:3: text is a number",
        "one.jsonl:4:11: byte 0xc4",
        "one.jsonl:5: no known",
    ):
        assert place in text
    for place in ("two.jsonl:1: messages[1] is an empty", "two.jsonl:2: messages[0].role is the string"):
        assert place in text
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half done is kept


def test_what_the_template_refuses_is_listed_with_its_lines(tmp_path, make):
    template = Template(byte_level(TEMPLATES["mistral"]))
    rows = [turns("q", "a"), {"messages": [{"role": "assistant", "content": "first"}]}]
    assert "train.jsonl:2: the chat template refuses it: roles must alternate" in failure(make, rows, template=template)


def test_turns_for_a_model_without_a_template_have_a_way_out(make):
    text = failure(make, [turns("q", "a")] * 2, template=Template(byte_level()))
    assert "train.jsonl:1: turns need a chat template and the tokenizer has none" in text
    assert "use an instruct model" in text


def test_a_row_that_is_expanded_keeps_its_line(make):
    thinking = turns("q", "<think>\nx\n</think>\n\na", "q", "b")
    prepared = make([thinking], template=Template(byte_level(TEMPLATES["qwen3"])))
    assert (prepared.report.rows, prepared.report.documents) == (1, 2)
    assert prepared.corpus.origins[:, 1].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_length": 1}, "max_length = 1"), ({"overlong": "crop"}, "overlong = 'crop', expected truncate or drop")],
)
def test_options_that_make_no_sense(make, options, said):
    assert said in failure(make, [pair("q", "a")], **options)


def test_sources_that_make_no_sense(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair("q", "a")])
    assert "no source" in failure(prepare, [], CHAT, 100)
    assert "a.jsonl is named twice" in failure(prepare, [path, str(path)], CHAT, 100)


def test_several_files_are_one_corpus(tmp_path):
    one, two = write(tmp_path / "one.jsonl", [pair("q", "a")]), tmp_path / "two.csv"
    two.write_text("prompt,completion\nq,b\n")
    prepared = prepare([one, two], CHAT, 100, cache=tmp_path / "cache")
    assert [prepared.corpus.origin(i) for i in range(2)] == [f"{one}:1", f"{two}:2"]
    assert list(prepared.report.files) == [str(one), str(two)]


# The cache


def test_the_same_rows_are_not_tokenised_twice_and_come_back_byte_for_byte(make):
    rows = [pair("q", f"answer {i}") for i in range(300)]
    first, second = make(rows), make(rows)
    assert (first.reused, second.reused) == (False, True)
    assert first.report == second.report
    for name in ("tokens", "supervised", "bounds", "origins"):
        assert getattr(first.corpus, name).tobytes() == getattr(second.corpus, name).tobytes()


def test_the_same_bytes_under_another_name_are_found_and_named_anew(make, tmp_path):
    make([pair("q", "a")], name="old.jsonl")
    found = make([pair("q", "a")], name="new.jsonl")
    assert found.reused
    assert found.corpus.origin(0) == f"{tmp_path / 'new.jsonl'}:1"
    assert list(found.report.files) == [str(tmp_path / "new.jsonl")]


def test_anything_that_changes_the_tokens_is_another_entry(make, tmp_path):
    rows = [pair("q", "a"), turns("q", "a", "q", "b")]
    make(rows)
    tokenizer = byte_level(TEMPLATES["generation tags"])
    others = [
        make([*rows, pair("q", "c")]),
        make(rows, max_length=100),
        make(rows, overlong="drop"),
        make(rows, template=Template(byte_level(TEMPLATES["chatml"]))),
        make(rows, template=Template(tokenizer, train_on="last")),
        make(rows, template=Template(byte_level(TEMPLATES["generation tags"], eos="<|im_end|>"))),
        make(rows, name="train.json"),
    ]
    assert not any(prepared.reused for prepared in others)
    assert len(list((tmp_path / "cache").iterdir())) == len(others) + 1


@pytest.mark.parametrize("name", ["tokens.npy", "manifest.json", "origins.npy"])
def test_a_damaged_entry_is_made_anew(make, tmp_path, name):
    rows = [pair("q", f"answer {i}") for i in range(20)]
    first = make(rows)
    before = first.corpus.tokens.tobytes()
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / name).write_bytes((entry / name).read_bytes()[:-1] + b"?")
    again = make(rows)
    assert not again.reused
    assert again.corpus.tokens.tobytes() == before
    assert make(rows).reused


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("where the home should be")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
    assert len(prepare(write(tmp_path / "a.jsonl", [pair("q", "a")]), CHAT, 100).corpus) == 1


def test_the_cache_lies_at_home_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    prepare(write(tmp_path / "a.jsonl", [pair("q", "a")]), CHAT, 100)
    assert len(list((tmp_path / ".cache" / "rankwise" / "tokens").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_said_so(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair("q", "a")])
    assert "the tokens cannot be written" in failure(prepare, path, CHAT, 100, cache=path / "below-a-file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_said_so_and_leaves_no_entry(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [pair("q", "a")])
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *args, **kw: opened(Path("/dev/full") if self.suffix == ".npy" else self, *args, **kw),
    )
    assert "No space left" in failure(prepare, path, CHAT, 100, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair("q", f"answer {i}") for i in range(500)])

    def interrupt(rows, share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(path, CHAT, 100, cache=tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


# Size


def test_progress_tells_rows_and_the_share_of_all_files(tmp_path):
    rows = [pair("q", f"answer {i}") for i in range(700)]
    files = [write(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl")]
    seen: list[tuple[int, float]] = []
    for _ in range(2):
        prepare(files, CHAT, 100, cache=tmp_path / "cache", progress=lambda *done: seen.append(done))
    first = seen[: seen.index((1400, 1.0)) + 1]
    assert len(first) > 5
    assert first == sorted(first)
    assert any(0.3 < share < 0.7 for _, share in first)
    assert seen[-1] == (1400, 1.0)
    assert len(seen) == len(first) + 1  # found in the cache: at once


def test_a_row_of_a_million_tokens_and_a_word_of_ten_megabytes(make):
    rows = [pair("q", "word " * 1_000_000), {"text": "a" * 10_000_000}, pair("世界" * 500_000, "a"), pair("q", "a")]
    report = make(rows, max_length=256).report
    assert (report.documents, report.truncated) == (3, 2)
    assert report.dropped == {"no trained token within max_length": 1}
    report = make(rows, max_length=256, overlong="drop").report
    assert (report.documents, report.dropped) == (1, {"longer than max_length": 3})


def test_memory_does_not_grow_with_the_rows(make):
    def peak(count) -> int:
        rows = [pair("question " * 20, "answer " * 20)] * count
        path = None
        del path
        tracemalloc.start()
        prepared = make_from(rows)
        assert prepared.report.documents == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    def make_from(rows):
        return make(rows)

    small, large = peak(500), peak(6000)
    assert large < small + 5_000_000
    assert os.environ is not None
    assert np.int32
