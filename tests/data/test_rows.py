import codecs
import csv
import gzip
import io
import json
import sys
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from rankwise.data.hub_rows import read_hub
from rankwise.data.problems import Problems
from rankwise.data.rows import Origin, read_rows
from rankwise.errors import DataError, MissingPackageError

ROWS = [{"text": "one"}, {"text": "二"}, {"text": "three 🤖"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fields(source):
    return [row.fields for row in read_rows(source)]


def numbers(source):
    return [row.origin.line for row in read_rows(source)]


def failure(source) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(source))
    return str(caught.value)


# JSON lines


def test_lines_are_numbered_as_an_editor_does_and_blank_ones_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"text": "one"}\r\n  \r\n\n{"text": "two"}')
    assert [(row.origin, row.fields) for row in read_rows(path)] == [
        (Origin(str(path), 2), {"text": "one"}),
        (Origin(str(path), 5), {"text": "two"}),
    ]
    assert str(Origin("train.jsonl", 17)) == "train.jsonl:17"


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_marks_and_line_ends_are_no_content(tmp_path, mark, end):
    path = write(tmp_path / "a.jsonl", mark + lines(ROWS).encode().replace(b"\n", end))
    assert fields(path) == ROWS


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b\u0085c"}\n{"text": "d"}')
    assert numbers(path) == [1, 2]


def test_all_bad_lines_are_listed_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "ok"}\n{"text": \n[1]\n"x"\n17\n{"a": 1} {"b": 2}\n{"text": "ok"}\n')
    text = failure(path)
    assert "5 problems in the data" in text
    for number, reason in [
        (2, "not JSON: Expecting value at column"),
        (3, "a list, expected an object"),
        (4, "a string, expected an object"),
        (5, "a number, expected an object"),
        (6, "not JSON: Extra data"),
    ]:
        assert f"{path}:{number}: {reason}" in text


def test_twenty_problems_are_shown_and_the_rest_counted(tmp_path):
    text = failure(write(tmp_path / "a.jsonl", "{\n" * 57))
    assert text.count("not JSON") == 20
    assert "57 problems" in text
    assert "37 more" in text


def test_with_a_collector_the_good_rows_come_and_the_bad_ones_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\nbad\n{"text": "two"}\n')
    problems = Problems()
    assert len(list(read_rows(path, problems=problems))) == 2
    assert len(problems) == 1
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        problems.check()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "digits"),
        ('{"text": "tab\there"}', "Invalid control character"),
    ],
)
def test_json_that_python_cannot_take_is_a_problem_and_no_crash(tmp_path, line, reason):
    text = failure(write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n"))
    assert ":2: " in text
    assert reason in text


def test_an_empty_file_has_no_rows(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        assert fields(write(tmp_path / name, "")) == []
        assert fields(write(tmp_path / name, codecs.BOM_UTF8)) == []


def test_progress_rises_to_one(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        content = lines([{"text": f"{i} " * 100} for i in range(2000)]).encode()
        path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
        shares = [row.read for row in read_rows(path)]
        assert shares == sorted(shares)
        assert 0 <= shares[0] < 0.9
        assert shares[-1] == 1


# Encodings


@pytest.mark.parametrize(
    ("encoding", "said", "named"),
    [
        ("gbk", "天气很好，我们去看电影吧", "GBK"),
        ("big5", "天氣很好，我們去看電影吧", "BIG5"),
        ("shift_jis", "こんにちは、お元気ですか", "SHIFT_JIS"),
        ("cp1252", "café is naïve – always", "WINDOWS-1252"),
    ],
)
def test_another_encoding_is_named_with_line_byte_and_a_way_to_convert(tmp_path, encoding, said, named):
    good = '{"text": "ascii"}\n'
    content = good + json.dumps({"text": said}, ensure_ascii=False) + "\n"
    path = write(tmp_path / "a.jsonl", content.encode(encoding))
    text = failure(path)
    column = len('{"text": "') + next(i for i, c in enumerate(said) if not c.isascii()) + 1
    assert f"{path}:2:{column}: byte 0x" in text
    assert f"(offset {len(good) + column - 1} of the file)" in text
    assert f"iconv -f {named} -t UTF-8" in text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_utf_16_is_named_once(tmp_path, encoding, name):
    text = failure(write(tmp_path / name, lines(ROWS * 30).encode(encoding)))
    assert "UTF-16" in text
    assert "iconv -f UTF-16" in text


def test_one_bad_byte_spoils_one_line_and_not_the_others(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n')
    problems = Problems()
    assert [row.fields["text"] for row in read_rows(path, problems=problems)] == ["a", "b"]
    assert len(problems) == 1


def test_nul_bytes_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + b"\0" * 4096)
    assert f"{path}:2:1: a NUL byte (offset 14 of the file)" in failure(path)


def test_surrogates_written_as_bytes_are_not_utf8(tmp_path):
    assert "byte 0xed" in failure(write(tmp_path / "a.jsonl", '{"text": "\ud83d"}'.encode("utf-8", "surrogatepass")))


# JSON documents


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps({"version": 1, "data": ROWS, "more": [1, 2]}),
        json.dumps({"tags": ["a"], "rows": ROWS, "empty": []}, indent=4),
        lines(ROWS),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        "\n \t" + json.dumps(ROWS) + "\n\n",
    ],
    ids=["list", "indented", "wrapped", "wrapped and indented", "lines", "objects", "space around"],
)
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_in_every_layout(tmp_path, content, name):
    data = content.encode()
    assert fields(write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)) == ROWS


def test_json_rows_have_line_numbers_too(tmp_path):
    content = '{\n "data": [\n  {"text": "one"},\n  {\n   "text": "two"\n  }, {"text": "three"}\n ]\n}'
    assert numbers(write(tmp_path / "a.json", content)) == [3, 4, 6]


def test_one_conversation_alone_is_a_row_and_not_a_list_of_rows(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert fields(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]
    assert fields(write(tmp_path / "b.json", json.dumps({"text": "only"}))) == [{"text": "only"}]


def test_json_lines_that_are_a_list_after_all(tmp_path):
    assert fields(write(tmp_path / "a.jsonl", json.dumps(ROWS, indent=2))) == ROWS
    assert fields(write(tmp_path / "b.jsonl", json.dumps(ROWS))) == ROWS


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[{"text": "a"},\n {"text": }]', ":2: not JSON: Expecting value at column 11"),
        ('[{"text": "a"}\n {"text": "b"}]', ":2: not JSON: Expecting ']'"),
        ('[{"text": "a"}]\n[]', ":2: not JSON: Extra data"),
        ('[{"text": "a"}', ":1: not JSON: Expecting ']'"),
        ('[\n{"text": "a"},\n5]', ":3: a number, expected an object"),
        ("hello", ":1: not JSON: Expecting '{' at column 1"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_mistake_in_a_document_has_its_line(tmp_path, content, place):
    assert place in failure(write(tmp_path / "a.json", content))


# Tables


def test_csv_with_quotes_commas_and_line_ends_inside(tmp_path):
    content = 'prompt,completion\r\n"a, b","line one\nline two"\r\n\r\n"say ""hi""",x\r\n'
    path = write(tmp_path / "a.csv", content)
    rows = list(read_rows(path))
    assert [row.fields for row in rows] == [
        {"prompt": "a, b", "completion": "line one\nline two"},
        {"prompt": 'say "hi"', "completion": "x"},
    ]
    assert [row.origin.line for row in rows] == [2, 5]


def test_tsv_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.tsv", codecs.BOM_UTF8 + "text\tlabel\n你好, 世界\t1\n".encode())
    assert fields(path) == [{"text": "你好, 世界", "label": "1"}]


cells = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r"), max_size=12)


@settings(deadline=None, max_examples=60)
@given(table=st.lists(st.tuples(cells, cells), max_size=8), delimiter=st.sampled_from([",", "\t"]))
def test_a_table_comes_back_as_it_was_written_and_at_the_lines_it_was_written(table, delimiter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    expected = []
    for row in [("a", "b"), *table]:
        expected.append(buffer.getvalue().count("\n") + 1)
        writer.writerow(row)
    path = write(folder / ("t.csv" if delimiter == "," else "t.tsv"), buffer.getvalue())
    rows = list(read_rows(path))
    assert [(row.fields["a"], row.fields["b"]) for row in rows] == table
    assert [row.origin.line for row in rows] == expected[1:]


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.one_of(st.none(), st.text(st.characters(blacklist_categories=("Cs",)))), max_size=12))
def test_json_lines_come_back_as_they_were_written_and_at_their_lines(texts, tmp_path_factory):
    content = "\n".join("" if text is None else json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path = write(tmp_path_factory.mktemp("lines") / "a.jsonl", content)
    expected = [(i, text) for i, text in enumerate(texts, start=1) if text is not None]
    assert [(row.origin.line, row.fields["text"]) for row in read_rows(path)] == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a,b\n1,2\n1,2,3\n1\n", ":3: 3 fields, the header has 2 (a, b)"),
        ("a,b\n1,2\n1,2,3\n1\n", ":4: 1 fields, the header has 2"),
        ("a,b,a\n1,2,3\n", ":1: the header names 'a' more than once"),
        ('a,b\n1,2\n"open,2\n3,4\n', ":3: not a row of a table: unexpected end of data"),
        ('a,b\n1,"x"y\n', ":2: not a row of a table"),
        (b"a,b\n1,\xff\n", ":2:3: byte 0xff is not UTF-8"),
        (b"a,b\n1,\0\n", ":2:3: a NUL byte"),
    ],
)
def test_broken_tables_are_placed(tmp_path, content, reason):
    assert reason in failure(write(tmp_path / "a.csv", content))


def test_a_cell_of_ten_megabytes_is_read(tmp_path):
    path = write(tmp_path / "a.csv", "text\n" + "x" * 10_000_000 + "\n")
    assert len(fields(path)[0]["text"]) == 10_000_000


def test_parquet_with_nested_columns(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi"}], "n": 1},
        {"messages": [{"role": "user", "content": "b"}], "n": None},
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    found = list(read_rows(path))
    assert [row.fields for row in found] == rows
    assert [row.origin.line for row in found] == [1, 2]
    assert found[-1].read == 1


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    write(path, path.read_bytes()[:-10])
    assert "not a whole Parquet file" in failure(path)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    data = gzip.compress(lines(ROWS * 100).encode())
    assert "cannot be read" in failure(write(tmp_path / "a.jsonl.gz", data[:-20]))
    assert "cannot be read" in failure(write(tmp_path / "b.jsonl.gz", b"not gzip"))


# Sources


def test_sources_that_are_none(tmp_path):
    write(tmp_path / "train.jsonl", lines(ROWS))
    write(tmp_path / "notes.docx", "x")
    assert "no such file; did you mean 'train.jsonl'?" in failure(tmp_path / "trian.jsonl")
    assert "'.docx' is no kind of data file" in failure(tmp_path / "notes.docx")
    assert "a folder, expected a file" in failure(tmp_path)
    assert "it holds train.jsonl" in failure(tmp_path)
    assert "not the name of a data set" in failure("no such: name")
    assert "no such file" in failure("missing-folder/x.csv")


def test_a_hub_name_without_the_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'rankwise\[hub\]'"):
        list(read_rows("someone/some-data"))


def test_a_hub_name_that_cannot_be_loaded_is_said_so(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="neither a file here nor a data set"):
        list(read_rows("someone-nobody/nothing-at-all"))


def test_a_data_set_is_read_by_name_configuration_and_split(tmp_path, monkeypatch):
    """What `datasets` loads by name may lie in a folder, so this needs no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "someone" / "some-data"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", lines(ROWS))
    write(folder / "test.jsonl", lines(ROWS[:1]))
    rows = list(read_hub("someone/some-data", "train"))
    assert [row.fields for row in rows] == ROWS
    assert str(rows[1].origin) == "someone/some-data:2"
    assert [row.fields for row in read_hub("someone/some-data:default", "test")] == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'trian'; did you mean 'train'\?(.|\n)*its splits: train, test"):
        list(read_hub("someone/some-data", "trian"))
    with pytest.raises(DataError, match="neither a file here nor a data set"):
        list(read_hub("someone/some-data:other", "train"))


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(path) -> int:
        tracemalloc.start()
        count = sum(1 for _ in read_rows(path))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count
        return most

    row = {"text": "word " * 200}
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        for rows in (300, 6000):
            path = tmp_path / f"{rows}-{name}"
            if name == "a.parquet":
                parquet.write_table(pa.Table.from_pylist([row] * rows), path, row_group_size=256)
            else:
                write(path, lines([row] * rows) if name == "a.jsonl" else "text\n" + (row["text"] + "\n") * rows)
        assert peak(tmp_path / f"6000-{name}") < 2 * peak(tmp_path / f"300-{name}") + 100_000, name
