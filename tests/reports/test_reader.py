import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.lowrank import LowRank
from rankwise.adapters.spec import LoraSpec
from rankwise.adapters.tokens import TokenRows
from rankwise.errors import RunFolderError
from rankwise.formats.record import describe, write_record
from rankwise.reports.reader import read_run
from tests.reports.folders import evaluation, metrics, record, write_run

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def test_a_whole_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "docstrings"))
    assert run.name == "docstrings"
    assert run.record.parameters == 4_884_480
    assert len(run.record.sites) == 210
    assert len(run.curves["tuned"].steps) == 300
    assert [look.step for look in run.curves["tuned"].validations] == list(range(25, 301, 25))
    assert run.evaluation is not None
    assert run.evaluation.documents == 214
    assert [sample.reference is not None for sample in run.samples] == [True, True, True]


def test_everything_but_the_record_may_be_absent(tmp_path):
    run = read_run(write_run(tmp_path, metrics=None, evaluation=None, samples=None))
    assert (run.curves, run.events, run.evaluation, run.samples) == ({}, (), None, ())


def test_an_adapter_saved_outside_a_run_has_no_facts(tmp_path):
    names = ("schema", "spec", "base", "digest", "parameters", "sites", "modules")
    bare = {name: record()[name] for name in names}
    run = read_run(write_run(tmp_path, record=bare, metrics=None, evaluation=None, samples=None))
    assert (run.record.training, run.record.data, run.record.settings) == (None, None, ())


def test_what_formats_write_is_what_reports_read(tmp_path):
    spec = LoraSpec(targets=("q_proj", "v_proj"), rank_pattern={"layers.0.q_proj": 4}, modules_to_save=("head",))
    factors = LowRank(torch.ones(4, 3), torch.ones(2, 4), scale=8.0)
    rows = {"embed": TokenRows((7, 5), torch.ones(2, 3))}
    adapter = Adapter(spec, {"layers.0.q_proj": factors}, {"head": {"weight": torch.ones(1)}}, tokens=rows)
    base = {"name": "gpt2", "fingerprint": "ab", "vocabulary": 9, "storage": "nf4"}
    write_record(tmp_path, describe(adapter, base, {"versions": {"rankwise": "0.1.0"}}))
    read = read_run(tmp_path).record
    assert read.spec.targets == ("q_proj", "v_proj")
    assert read.spec.rank_pattern == {"layers.0.q_proj": 4}
    assert (read.sites["layers.0.q_proj"].rank, read.sites["layers.0.q_proj"].scale) == (4, 8.0)
    assert read.modules == ("head",)
    assert read.tokens == {"embed": (5, 7)}
    assert read.parameters == adapter.parameter_count()


def test_a_folder_without_record_is_refused_and_the_way_out_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"rankwise\.json: missing") as caught:
        read_run(tmp_path / "nowhere")
    assert "rankwise train" in caught.value.hint


def test_one_error_lists_the_problems_of_all_files(tmp_path):
    broken = record(parameters="many", digest=None)
    del broken["base"]["fingerprint"]
    lines = metrics(3)
    lines[1]["adapter"] = "../../etc"
    write_run(tmp_path, record=broken, metrics=lines, evaluation={"documents": 3}, samples=[{"prompt": 1}])
    with pytest.raises(RunFolderError) as caught:
        read_run(tmp_path)
    for problem in (
        "rankwise.json: parameters: Input should be a valid integer",
        "rankwise.json: digest: Input should be a valid string",
        "rankwise.json: base.fingerprint: Field required",
        "metrics.jsonl:2: adapter: String should match pattern",
        "evaluation.json: base: Field required",
        "samples.json: 0.prompt: Input should be a valid string",
        "samples.json: 0.after: Field required",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"kind": "step", "step": 1', "Expecting"),
        ("[1, 2]", "not an object"),
        ('{"kind": "stop"}', "kind 'stop' is none of step, evaluation, event"),
        ('{"kind": "event", "step": 3}', "what: Field required"),
        ('{"kind": "step", "step": "3", "adapter": "a", "supervised": 1}', "step: Input should be a valid integer"),
    ],
)
def test_a_broken_line_with_more_after_it_is_damage(tmp_path, line, problem):
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(RunFolderError) as caught:
        read_run(tmp_path)
    assert f"metrics.jsonl:1: {problem}" in str(caught.value)


def test_metrics_cut_at_any_byte_keep_every_whole_line(tmp_path):
    write_run(tmp_path, metrics=metrics(3))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        run = read_run(tmp_path)
        steps = len(run.curves["tuned"].steps) if run.curves else 0
        # A line whose end alone is missing is whole.
        assert steps in (whole[:cut].count(b"\n"), whole[: cut + 1].count(b"\n"))


def test_a_resumed_run_says_each_step_once_and_its_last_word_counts(tmp_path):
    lines = metrics(40)
    again = [line | {"loss": 1.0} for line in lines if line["step"] > 20]
    run = read_run(write_run(tmp_path, metrics=[*lines[:35], *again]))
    curve = run.curves["tuned"]
    assert [step.step for step in curve.steps] == list(range(1, 41))
    assert all(step.loss == 1.0 for step in curve.steps[20:])
    assert [look.step for look in curve.validations] == [25]


def test_a_loss_that_is_not_finite_is_a_fact_not_an_error(tmp_path):
    lines = metrics(3)
    lines[1]["loss"] = math.nan
    lines[2]["grad_norm"] = math.inf
    run = read_run(write_run(tmp_path, metrics=lines))
    losses = [step.loss for step in run.curves["tuned"].steps]
    assert losses[1] is not None
    assert math.isnan(losses[1])


def test_events_keep_what_they_were_told(tmp_path):
    event = {"kind": "event", "step": 7, "what": "skipped", "adapter": "tuned", "rows": ["train.jsonl:3"]}
    (read,) = read_run(write_run(tmp_path, metrics=[event])).events
    assert (read.step, read.what) == (7, "skipped")
    assert read.details == {"adapter": "tuned", "rows": ["train.jsonl:3"]}


def test_a_newer_schema_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="schema 2, this version reads 1"):
        read_run(write_run(tmp_path, record=record(schema=2)))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_an_evaluation_must_be_finite(tmp_path, number):
    found = evaluation()
    found["base"]["loss"] = number
    with pytest.raises(RunFolderError, match=r"evaluation\.json: base\.loss: Input should be a finite number"):
        read_run(write_run(tmp_path, evaluation=found))


def _drop_document(found):
    found["per_document"]["tokens"].pop()


def _move_interval(found):
    found["adapters"][0]["delta"]["high"] = found["adapters"][0]["delta"]["mean"] - 0.1


def _flatter(found):
    found["adapters"][0]["loss"] -= 0.2


def _rename(found):
    found["per_document"]["adapters"] = {"other": found["per_document"]["adapters"]["tuned"]}


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_drop_document, "per_document holds 213 documents, 'documents' says 214"),
        (_drop_document, "per_document.base has 214 sums for 213 documents"),
        (_move_interval, "lies outside"),
        (_flatter, "is not its loss − base loss"),
        (_flatter, "per_document.adapters.tuned gives"),
        (_rename, "per_document names ['other'], adapters are ['tuned']"),
    ],
)
def test_figures_that_contradict_each_other_are_not_reported(tmp_path, spoil, problem):
    found = evaluation()
    spoil(found)
    with pytest.raises(RunFolderError) as caught:
        read_run(write_run(tmp_path, evaluation=found))
    assert problem in str(caught.value)


def test_an_adapter_may_be_called_base(tmp_path):
    run = read_run(write_run(tmp_path, evaluation=evaluation(names=("base",))))
    assert run.evaluation is not None
    assert run.evaluation.adapters[0].loss != run.evaluation.base.loss


@settings(max_examples=80, deadline=None)
@given(key=st.sampled_from(sorted(record())), value=JSON)
def test_any_value_anywhere_is_read_or_refused_politely(tmp_path_factory, key, value):
    folder = Path(tmp_path_factory.getbasetemp()) / "any-value"
    write_run(folder, record=record(sites={}) | {key: value}, metrics=None, evaluation=None, samples=None)
    with suppress(RunFolderError):
        assert getattr(read_run(folder).record, key) is not None or value is None


def test_text_that_is_no_json_is_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "samples.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RunFolderError, match=r"samples\.json: Invalid JSON"):
        read_run(tmp_path)


def test_unknown_facts_are_left_to_those_who_know_them(tmp_path):
    write_run(tmp_path, record=record(search={"rungs": 3}))
    assert read_run(tmp_path).record.schema == 1
    assert "search" in json.loads((tmp_path / "rankwise.json").read_text())
