"""Pages and cards of every task: its own words, its own measures, and nothing that does not hold for it."""

import re

import pytest

from rankwise.reports.card import render as card_of
from rankwise.reports.page import render as page_of
from rankwise.reports.reader import read_run
from rankwise.reports.verdict import judge
from rankwise.tasks import TASKS
from tests.reports.folders import HOSTILE, classified, evaluation, record, write_run
from tests.reports.test_page import Page

CLASSES = [{"name": "bad", "label": 0, "count": 12}, {"name": HOSTILE, "label": 1, "count": None}]
CLASSIFYING = [task for task in TASKS if TASKS[task].classifies]


def run_of(folder, task, **parts):
    if task in CLASSIFYING:
        parts = {"record": record(task=task, classes=CLASSES), "evaluation": classified(), **parts}
    return read_run(write_run(folder, **{"record": record(task=task), "evaluation": evaluation(), **parts}))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_page_and_a_card_in_its_own_words(tmp_path, task):
    run = run_of(tmp_path, task)
    page, card = Page(page_of(run)).text, card_of(run)
    unit = TASKS[task].unit
    assert f"nats/{unit}" in page
    assert f"nats per {unit}" in page_of(run)
    assert f"pipeline_tag: {TASKS[task].pipeline}" in card
    assert f"from transformers import {TASKS[task].loads}, {TASKS[task].reads}" in card
    assert f"Nats per {unit} on" in card
    if task not in CLASSIFYING:
        assert TASKS[task].item in page
        assert "perplexity" in page.lower()
    else:
        assert "perplexity" not in (page + card).lower()
        assert "token of the wanted answer" not in page


@pytest.mark.parametrize("task", CLASSIFYING)
def test_accuracy_and_f1_stand_beside_the_loss_with_what_they_are_compared_to(tmp_path, task):
    run = run_of(tmp_path, task, samples=None)
    page, card = Page(page_of(run)).text, card_of(run)
    verdict = judge(run).sentence
    assert verdict.startswith(f"Tuned is better than the class frequencies alone by 0.400 nats/{TASKS[task].unit}")
    assert "accuracy 50.5 % → 90.5 % (85.8 … 93.8)" in verdict
    for text in (page, card):
        assert "90.5 % (85.8 … 93.8)" in text
        assert "0.871" in text
        assert "class frequencies" in text
    assert "p = 1.5e-12" in page
    assert "most frequent class" in " ".join(page.split())
    assert "num_labels=2" in card
    assert HOSTILE not in page_of(run) + card


def test_a_base_with_a_head_of_its_own_is_called_the_base(tmp_path):
    run = run_of(tmp_path, "sequence-classification", evaluation=classified(reference="base"))
    assert "better than the base by" in judge(run).sentence
    assert "class frequencies" not in page_of(run) + card_of(run)
    assert re.search(r"<td>base</td>", page_of(run))


def test_a_record_of_before_there_were_tasks_is_of_a_causal_language_model(tmp_path):
    old = {name: value for name, value in record().items() if name not in ("task", "classes")}
    run = read_run(write_run(tmp_path, record=old))
    assert run.record.task == "causal-lm"
    assert "pipeline_tag: text-generation" in card_of(run)
