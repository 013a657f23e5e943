import json

import pytest

from rankwise.data.prepare import prepare
from rankwise.data.rows import read_rows
from rankwise.data.split import split
from rankwise.data.template import Template
from rankwise.errors import DataError
from tests.data.chat import byte_level

ROWS = [{"text": f"row number {n}"} for n in range(50)]


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows}])
def test_rows_of_a_json_document_on_one_line_are_told_apart(tmp_path, wrap):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(wrap(ROWS)))
    assert [row.origin.line for row in read_rows(path)] == list(range(1, 51))
    corpus = prepare(path, Template(byte_level()), 64, cache=tmp_path / "cache").corpus
    train, valid = split(corpus, 0.1)
    assert (len(train), len(valid)) == (45, 5)


def test_a_bad_row_on_the_one_line_is_called_by_its_number(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*ROWS[:3], 7]))
    with pytest.raises(DataError, match=r"rows.json: row 4: a number"):
        list(read_rows(path))


def test_a_json_document_on_many_lines_and_json_lines_keep_their_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:3], indent=1))
    (tmp_path / "a.jsonl").write_text("\n\n" + json.dumps(ROWS[0]))
    assert [str(row.origin) for row in read_rows(tmp_path / "a.json")][1] == f"{tmp_path / 'a.json'}:5"
    assert [str(row.origin) for row in read_rows(tmp_path / "a.jsonl")] == [f"{tmp_path / 'a.jsonl'}:3"]
