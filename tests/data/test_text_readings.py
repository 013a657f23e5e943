"""Rows as encoders are given them, against the tokenizer itself; and what becomes of rows that are wrong."""

import json

import pytest

from rankwise.data.classes import Classes
from rankwise.data.prepare import prepare
from rankwise.data.split import overlap, split
from rankwise.data.text_readings import LabelledTexts, PlainTexts, SourceTargets
from rankwise.errors import DataError
from tests.data.chat import byte_level, framed

CLASSES = Classes(("no", "yes"), (0, 1))


@pytest.fixture
def read(tmp_path):
    """Rows through a reading, with all that `prepare` does."""

    def prepared(rows, reading, max_length=64, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return prepare(path, reading, max_length, cache=tmp_path / "cache", **settings)

    return prepared


# ── labelled ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_is_what_the_tokenizer_makes_of_it_and_its_class_is_beside_it(read):
    rows = [{"text": "the lazy dog", "label": 1}, {"sentence": "a good answer", "label": 0}]
    found = read(rows, LabelledTexts(framed(), CLASSES))
    for i, text in enumerate(("the lazy dog", "a good answer")):
        tokens, second = found.corpus.document(i)
        assert tokens.tolist() == framed()(text)["input_ids"]
        assert not second.any()
    assert found.corpus.labels.tolist() == [1, 0]
    assert found.corpus.classes == ("no", "yes")
    assert not found.corpus.paired
    assert (found.report.tokens, found.report.supervised) == (int(found.corpus.lengths().sum()), 2)


@pytest.mark.parametrize("names", [("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis")])
def test_a_pair_is_told_apart_as_the_tokenizer_does(read, names):
    rows = [{names[0]: "what is a good answer", names[1]: "hello there", "label": "yes", "label_name": "yes"}]
    found = read([*rows, {"text": "alone", "label": 0}], LabelledTexts(framed(), CLASSES)).corpus
    want = framed()("what is a good answer", "hello there")
    tokens, second = found.document(0)
    assert tokens.tolist() == want["input_ids"]
    assert second.astype(int).tolist() == want["token_type_ids"]
    assert found.paired
    assert found.labels.tolist() == [1, 0]


@pytest.mark.parametrize("pair", [None, "the user asks the assistant again and again"])
def test_what_is_too_long_is_cut_as_the_tokenizer_cuts_and_counted(read, pair):
    text = "the quick brown fox jumps over the lazy dog " * 300
    row = {"text": text, "label": 1} if pair is None else {"text_a": text, "text_b": pair, "label": 1}
    found = read([row], LabelledTexts(framed(), CLASSES), max_length=40)
    want = framed()(text, pair, truncation=True, max_length=40)["input_ids"]
    assert found.corpus.document(0)[0].tolist() == want
    assert len(want) == 40
    assert found.report.truncated == 1
    left_out = read([row, {"text": "short", "label": 0}], LabelledTexts(framed(), CLASSES), 40, overlong="drop")
    assert (len(left_out.corpus), left_out.report.dropped) == (1, {"longer than max_length": 1})


def test_bad_rows_are_told_by_line_all_at_once(read):
    rows = [
        {"text": "", "label": 1},
        {"text": "a", "label": "maybe"},
        {"txt": "b", "label": 1},
        {"text": 3, "label": 0},
    ]
    with pytest.raises(DataError) as caught:
        read(rows, LabelledTexts(framed(), CLASSES))
    for part in (
        ":1: text is empty",
        ":2: label 'maybe' is none of no, yes",
        ":3: has 'label' but no 'text'",
        ":4: text is",
    ):
        assert part in str(caught.value)


def test_what_is_kept_is_found_again_and_other_classes_are_other_documents(read):
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(6)]
    first, again = (read(rows, LabelledTexts(framed(), CLASSES)) for _ in range(2))
    assert (first.reused, again.reused) == (False, True)
    assert first.corpus.digest == again.corpus.digest
    turned = read(rows, LabelledTexts(framed(), Classes(("yes", "no"), (1, 0))))
    assert not turned.reused
    assert turned.corpus.labels.tolist() == [1, 0] * 3


def test_a_text_stays_on_one_side_of_a_split_however_it_is_labelled(read):
    rows = [{"text": f"text {n // 2}", "label": n % 2} for n in range(40)]
    train, valid = split(read(rows, LabelledTexts(framed(), CLASSES)).corpus, 0.25)
    assert len(train) + len(valid) == 40
    assert overlap(train, valid) == 0
    assert all(len(part.labels) == len(part) for part in (train, valid))


# ── source and target ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"source": "say it", "target": "it"}, "say it"),
        ({"prompt": "say it", "completion": "it"}, "say it"),
        ({"prompt": "say it", "completion": "it", "system": "be short"}, "be short\n\nsay it"),
        ({"instruction": "say", "input": "it", "output": "it"}, "say\n\nit"),
        ({"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]}, "say it"),
    ],
)
def test_every_shape_of_a_question_and_its_answer_is_a_source_and_its_target(read, row, source):
    found = read([row], SourceTargets(framed())).corpus
    read_part, written = found.document(0)
    assert read_part.tolist() == framed()(source)["input_ids"]
    assert written.tolist() == framed()(text_target="it")["input_ids"]
    assert found.supervised_counts().tolist() == [len(written)]


def test_a_conversation_is_not_one_text_to_read_and_one_to_write(read):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match="turns user, assistant, user, assistant"):
        read([{"messages": turns}], SourceTargets(framed()))


def test_source_and_target_are_each_cut_to_the_length(read):
    found = read([{"source": "long " * 100, "target": "longer " * 100}], SourceTargets(framed()), max_length=20)
    assert [len(part) for part in found.corpus.document(0)] == [20, 20]
    assert found.report.truncated == 1


def test_a_source_with_two_targets_is_on_one_side(read):
    rows = [{"source": f"say {n // 2}", "target": f"{n}"} for n in range(40)]
    train, valid = split(read(rows, SourceTargets(framed())).corpus, 0.25)
    assert overlap(train, valid) == 0


# ── masked ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_special_tokens_are_never_hidden(read):
    found = read([{"text": "the lazy dog " * 5}], PlainTexts(framed(), words=500)).corpus
    tokens, free = found.laid.document(0)
    assert free.tolist() == [
        not special for special in framed()("the lazy dog " * 5, return_special_tokens_mask=True)["special_tokens_mask"]
    ]
    ends = {0, len(tokens) - 1}
    for step in range(50):
        _, hidden, _ = found.drawn(step).document(0)
        assert not ends & set(hidden.tolist())


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(DataError, match="no mask token"):
        PlainTexts(byte_level(), words=500)


def test_a_document_is_shown_with_what_is_learnt_marked(read):
    labelled = LabelledTexts(framed(), CLASSES)
    assert labelled.shown(read([{"text": "hello", "label": 1}], labelled).corpus, 0)[-1] == ("yes", True)
    pairs = SourceTargets(framed())
    marked = pairs.shown(read([{"source": "say it", "target": "it"}], pairs).corpus, 0)
    assert [text for text, trained in marked if trained] == ["<s>it</s>"]
    texts = PlainTexts(framed(), words=500)
    found = read([{"text": "the lazy dog " * 5}], texts).corpus
    assert sum(trained for _, trained in texts.shown(found, 0)) >= 1
