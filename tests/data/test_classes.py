"""Classes out of rows: numbers in their order, names by the alphabet, everything that contradicts itself at once."""

import json

import pytest

from rankwise.data.classes import Classes, check_known, find_classes, label_of
from rankwise.errors import DataError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_numbers_with_names_come_in_the_order_of_the_numbers_and_are_counted(tmp_path):
    rows = [{"text": "x", "label": n, "label_name": name} for n, name in [(2, "a"), (0, "z"), (2, "a"), (1, "m")]]
    found = find_classes(write(tmp_path / "rows.jsonl", rows))
    assert found == Classes(("z", "m", "a"), (0, 1, 2), (1, 1, 2))
    assert Classes.of_json(json.loads(json.dumps(found.to_json()))) == found


def test_names_alone_come_by_the_alphabet_and_numbers_need_not_be_dense(tmp_path):
    named = find_classes(write(tmp_path / "named.jsonl", [{"label": name} for name in ("pear", "apple", "fig")]))
    assert named.names == named.labels == ("apple", "fig", "pear")
    stars = find_classes(write(tmp_path / "stars.jsonl", [{"label": n} for n in (10, 9, 1)]))
    assert (stars.names, stars.labels) == (("1", "9", "10"), (1, 9, 10))


def test_a_table_and_json_mean_the_same_classes(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("text,label\na,1\nb,0\nc,-1\n", encoding="utf-8")
    assert find_classes(table).labels == (-1, 0, 1)


@pytest.mark.parametrize(
    ("value", "label"), [(3, 3), ("3", 3), (3.0, 3), (" red ", "red"), (True, "true"), (False, "false")]
)
def test_what_a_label_may_be(value, label):
    assert label_of({"label": value}) == (label, None)


@pytest.mark.parametrize("value", [0.5, "", "  ", [], {}, None])
def test_what_a_label_may_not_be(value):
    with pytest.raises(ValueError, match="expected a whole number or a name"):
        label_of({"label": value})


def test_a_row_is_known_by_its_name_its_number_or_a_name_in_place_of_the_number():
    classes = Classes(("no", "yes"), (0, 1))
    assert [classes.number(0), classes.number(7, "yes"), classes.number("Yes"), classes.number(0, "YES")] == [
        0,
        1,
        1,
        1,
    ]
    assert classes.number(2) is classes.number("maybe") is classes.number(0, "maybe") is None


@pytest.mark.parametrize("names", [("0", "1"), ("LABEL_0", "LABEL_1")])
def test_where_nobody_gave_names_the_number_counts(names):
    assert Classes(names, (0, 1)).number(1, "yes") == 1


def test_every_contradiction_is_told_at_once(tmp_path):
    rows = [
        {"label": 0, "label_name": "a"},
        {"label": 0, "label_name": "b"},
        {"label": 1, "label_name": "a"},
        {"text": "nothing said"},
        {"label": 0.5},
    ]
    with pytest.raises(DataError) as caught:
        find_classes(write(tmp_path / "rows.jsonl", rows))
    for part in (
        "rows.jsonl:2: label 0 is called 'a' and 'b'",
        "'a' is that of 0 and 1",
        "rows.jsonl:4: has no 'label'",
    ):
        assert part in str(caught.value)
    assert "rows.jsonl:5: label is a number (0.5)" in str(caught.value)


@pytest.mark.parametrize("rows", [[], [{"label": 1}, {"label": 1}]])
def test_one_class_is_nothing_to_tell_apart(tmp_path, rows):
    with pytest.raises(DataError, match="nothing to tell apart"):
        find_classes(write(tmp_path / "rows.jsonl", rows))


def test_labels_that_are_not_learnt_are_listed_with_their_rows(tmp_path):
    learnt = find_classes(write(tmp_path / "train.jsonl", [{"label": "a"}, {"label": "b"}]))
    check_known(learnt, write(tmp_path / "good.jsonl", [{"label": "b"}]))
    with pytest.raises(DataError) as caught:
        check_known(
            learnt, write(tmp_path / "bad.jsonl", [{"label": "a"}, {"label": "c"}, {"label": 4}, {"label": "c"}])
        )
    text = str(caught.value)
    assert "'c': 2 rows, first" in text
    assert "bad.jsonl:2" in text
    assert "4: 1 rows, first" in text
    assert "learnt are a, b" in text


def test_a_models_own_order_goes_before_that_of_the_data():
    found = Classes(("negative", "positive"), (0, 1), (5, 7))
    assert found.as_ordered(["POSITIVE", "NEGATIVE"]) == Classes(("positive", "negative"), (1, 0), (7, 5))
    assert found.as_ordered(["negative"]) is found.as_ordered(["negative", "other"]) is None
    assert found.as_ordered(["negative", "positive", "positive"]) is None
