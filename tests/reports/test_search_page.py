import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import RunFolderError
from rankwise.reports.search_page import write_search_report
from rankwise.reports.search_plots import share
from rankwise.reports.search_reader import read_search
from rankwise.reports.search_traces import kinds, outside
from tests.reports.folders import HOSTILE
from tests.reports.searches import (
    STEPS,
    allocated,
    doubted,
    express,
    hostile,
    stopped,
    undecided,
    unreliable,
    whole,
    write_search,
)
from tests.reports.test_page import Page, _themes

SECTIONS = (
    "count",
    "noise",
    "rate",
    "targets",
    "ladder",
    "methods",
    "allocation",
    "confirm",
    "ship",
    "cost",
    "trials",
    "reproduce",
)
MADE = (whole, express, undecided, doubted, allocated, unreliable, stopped, hostile)


def report(folder, found) -> str:
    return write_search_report(write_search(folder, found)).read_text(encoding="utf-8")


def words(text: str) -> str:
    return Page(text).text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("searches")
    return {make.__name__: report(folder / make.__name__, make()) for make in MADE}


@pytest.fixture(scope="module")
def page(pages) -> str:
    return pages["whole"]


# ── what the page says ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_recommendation_comes_first_and_every_step_follows(page):
    ids = Page(page).values("id")
    assert [identity for identity in ids if identity in SECTIONS] == list(SECTIONS)
    assert ids.index("verdict") < ids.index("count")


@pytest.mark.parametrize(
    "said",
    [
        "recommended",
        "Rank 8, alpha 32, learning rate 0.0005, all-linear: enough",
        "More seeds (--budget full) and more documents narrow every interval",
        "rankwise train --model SmolLM2 --data train.jsonl --rank 8 --alpha 32 --lr 5e-4 --out winner",
        "305,280 parameters",
        "2.4490 nats/token",
        "2.1631, 2.1594, 2.1662 nats/token",
        "0.0034 nats/token",
        "0.0158 nats/token",
        "0.0057 nats/token",
        "1/8 of a full run, 50 steps",
        "best 5e-4: 2.163",
        "1/4 of a full run 1.25e-4 2.2410 +0.078 +0.067 … +0.089",
        "attention, rank 44: +0.031, worse",
        "mlp, rank 24: +0.007, cannot tell",
        "8 2,442,240 2.0315 +0.0018 −0.0043 … +0.0079 +0.0069 not worse 87 %",
        "one adapter of rank 64, cut: against itself",
        "Outside the frame, of the cut adapter: +0.191 at rank 2, +0.084 at rank 4",
        "form=dora: −0.0031, cannot tell",
        "lr_ratio=16: −0.0148, better",
        "init=pissa: diverged",
        "one nested adapter of rank 64, against rank 32, the best",
        "8 2.0361 +0.0046 −0.0015 … +0.0107",
        "ranks given out by gradients are not recommended: -0.0021 nats",
        "agree by 0.93 about the ranks",
        "2,442,144, of rank 8 everywhere 2,442,240",
        "allocated against uniform: −0.0021, cannot tell",
        "allocated against shuffled ones: +0.0006, cannot tell",
        "shuffled 2 against uniform: −0.0038, cannot tell",
        "a fresh adapter trained at exactly these ranks loses 2.0473 nats/token, +0.0012",
        "8 2.0423 +0.0016 −0.0042 … +0.0074 +0.0065 +0.419 +0.379 … +0.459",
        "1,316,992 of 2,442,240 parameters",
        "2.0461",
        "this search: 11.8 full runs",
        "every rate with every rank at full length: 36 full runs",
        "noise r 16, 0.0005, all-linear 2 1/4 of a full run finished 2.1662",
        "to confirm on 322 67,904 6,377",
        "fingerprint " + "5f0c" * 16,
        "torch 2.13.0",
        "processor AMD EPYC 9R14",
        "rankwise search --model SmolLM2 --data train.jsonl --out runs/search --also form=dora",
    ],
)
def test_the_numbers_of_the_search_are_said(page, said):
    assert said in words(page)


def test_every_trial_is_in_the_table(page):
    rows = page.partition('id="trials"')[2].partition("</section>")[0]
    assert rows.count("<tr") == len(whole()["trials"]) + 1


def test_the_one_sided_bound_that_decides_is_told(page):
    assert "one-sided 95 % bound" in words(page)


@pytest.mark.parametrize(
    ("name", "kind", "look"),
    [
        ("whole", "recommended", "recommended"),
        ("express", "provisional", "provisional"),
        ("undecided", "cannot tell", "unclear"),
        ("stopped", "no recommendation", "unmeasured"),
    ],
)
def test_how_sure_it_is_can_be_seen(pages, name, kind, look):
    verdict = pages[name].partition('id="verdict"')[2].partition("</section>")[0]
    assert f'class="verdict {look}"' in verdict
    assert re.search(rf'class="kind">{kind}\b', verdict)


def test_without_a_ladder_the_cut_adapter_stands_alone(pages):
    assert "Every rank was trained at full length" in words(pages["whole"])
    said = words(pages["express"])
    assert "Every rank was trained" not in said
    assert "against the same adapter at rank 64" in said
    assert "against rank 32, the best" not in said
    assert "+0.0297" in said
    assert 'id="targets-wide-title"' not in pages["express"]
    assert len(re.findall(r"Not run: ", said)) == 3  # layers, methods and ranks by layer


def test_ranks_by_layer_that_are_better_are_in_the_recommendation(pages):
    said = words(pages["allocated"])
    assert "ranks given out by gradients are recommended" in said
    assert "allocated against shuffled ones: −0.0098, better" in said
    assert "−0.0103 nats/token against rank 8 everywhere" in said
    assert "rank 8 given out by layer" in said
    assert "a fresh adapter trained at exactly these ranks loses 2.0394" in said
    assert 'id="given-wide-title"' in pages["allocated"]


def test_an_allocation_that_was_not_tried_says_why(pages):
    said = words(pages["unreliable"])
    assert "ranks given out by activations are not reliable" in said
    assert "agree by 0.41 about the ranks" in said
    assert 'id="allocated-wide-title"' not in pages["unreliable"]
    assert "Not checked against training at these ranks: its budget" in words(pages["express"])
    assert "ranks by layer were not asked for (--allocate)" in words(pages["express"])


def test_what_cannot_be_told_is_not_called_enough(pages):
    said = words(pages["undecided"])
    assert "whether rank 8 or 16 is enough cannot be told" in said
    assert "about 5 times as many documents" in said
    assert "8 2,442,240 2.0315 +0.002 −0.018 … +0.022 +0.019 cannot tell" in said
    assert 'id="confirmed-wide-title"' not in pages["undecided"]  # the best was chosen: nothing stands beside it
    assert "rank 8: +0.002, cannot tell" in words(pages["doubted"])
    assert re.search(r"gained over the base by rank 32, .* lost by rank 8 against rank 32", words(pages["doubted"]))


def test_neighbours_that_were_confirmed_stand_beside_the_chosen_rank(tmp_path):
    found = whole()
    smaller = found["confirm"]["points"][0] | {"rank": 4, "loss": 2.0707, "verdict": "worse"}
    smaller["delta"] = {"mean": 0.03, "low": 0.024, "high": 0.036, "upper": 0.035}
    found["confirm"]["points"].insert(0, smaller)
    said = words(report(tmp_path, found))
    assert "rank 4: +0.0300, worse" in said
    assert "rank 8: +0.0016, not worse" in said


@pytest.mark.parametrize("last", ["count", "noise", "rate", "targets", "nested", "methods", "allocation", "confirm"])
def test_a_search_that_was_stopped_says_where(tmp_path, last):
    text = report(tmp_path, stopped(last))
    said, done = words(text), STEPS.index(last)
    assert f"ended with the step “{'ladder' if last == 'nested' else last}”" in said
    assert ("smallest difference that two trainings" in said) == (done >= STEPS.index("noise"))
    assert ('id="rates-wide-title"' in text) == (done >= STEPS.index("rate"))
    assert ('id="rank-wide-title"' in text) == (done >= STEPS.index("ladder"))
    assert 'id="kept-wide-title"' not in text
    assert "rankwise train" not in said
    assert "The same command with --resume" in said


def test_no_grid_is_told_where_no_rates_were_compared(pages):
    """The grid is every rate with every rank: without rates it is no comparison."""
    assert "plain grid" not in words(pages["stopped"])
    assert "every rate with every rank" not in words(pages["stopped"])
    assert "0.75 full runs" in words(pages["stopped"])


# ── what the page is ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [make.__name__ for make in MADE])
def test_nothing_is_fetched_and_nothing_runs(pages, name):
    text = pages[name]
    parsed = Page(text)
    assert {"script", "img", "iframe", "object", "embed", "video", "audio"}.isdisjoint(parsed.tags)
    assert parsed.values("src") == []
    assert all(link.startswith(("#", "data:")) for link in parsed.values("href"))
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    assert not [attribute for attribute, _ in parsed.attributes if attribute.startswith("on")]
    assert not re.search(r"\b(nan|inf|NaN|Infinity|Undefined|None)\b", parsed.text)


@pytest.mark.parametrize("name", [make.__name__ for make in MADE])
def test_ids_are_unique_and_links_lead_somewhere(pages, name):
    ids = Page(pages[name]).values("id")
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([\w.-]+)', pages[name])) <= set(ids)


def test_every_colour_is_in_the_stylesheet_light_and_dark(page):
    light, dark = _themes(page)
    used = set(re.findall(r"var\(--([\w-]+)\)", page)) - {"sans", "mono", "shade"}
    assert used <= light.keys() & dark.keys()


def test_hostile_text_is_text(pages):
    assert "<script" not in pages["hostile"]
    assert Page(pages["hostile"]).text.count(HOSTILE) > 15


@settings(max_examples=6, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_is_text(tmp_path_factory, text):
    found = stopped("noise")
    found |= {"command": text, "machine": {text: [text]}, "model": {"name": f"<img src=x>{text}", "fingerprint": text}}
    parsed = Page(report(tmp_path_factory.mktemp("any"), found))
    assert {"script", "img"}.isdisjoint(parsed.tags)


def test_the_same_search_makes_the_same_small_page(page, tmp_path):
    assert report(tmp_path / "whole", whole()) == page
    assert len(page.encode()) < 550_000  # two maps of 210 layers, wide and narrow


def test_a_long_curve_is_thinned(tmp_path):
    found = stopped("noise")
    for trial in found["trials"]:
        trial["curve"] = [[step, 2.0 + 0.1 * (step % 7)] for step in range(1, 20_001)]
    assert len(report(tmp_path, found).encode()) < 200_000


def test_losses_that_were_not_finite_leave_a_gap(tmp_path):
    found = whole()
    for trial in found["trials"]:
        trial["curve"][::3] = [[step, None] for step, _ in trial["curve"][::3]]
    found["trials"][0]["curve"] = []
    assert 'id="curves-rate-wide-title"' in report(tmp_path, found)


def test_one_rank_one_rate_and_no_difference_make_a_page(tmp_path):
    found = whole()
    rung = {"share": 1.0, "points": [whole()["rate"]["rungs"][1]["points"][2]]}
    found["rate"] |= {"rungs": [rung], "alike": [5e-4], "interior": False}
    point = found["ladder"]["points"][4]
    found["ladder"] |= {"best": 32, "chosen": 32, "tolerance": 0.0, "points": [point]}
    found["truncation"] = None
    found["confirm"] |= {"chosen": 32, "verdict": "alone", "points": [found["confirm"]["points"][1]]}
    found["recommendation"] |= {"rank": 32}
    text = report(tmp_path, found)
    assert 'id="rank-wide-title"' in text
    assert 'id="confirmed-wide-title"' not in text
    assert "went on to the next" not in text
    assert not re.search(r"\b(nan|inf)\b", Page(text).text)


@pytest.mark.parametrize(
    ("task", "unit"), [("sequence-classification", "nats/document"), ("image-classification", "nats/picture")]
)
def test_every_task_has_its_unit(tmp_path, task, unit):
    said = words(report(tmp_path, whole(task=task)))
    assert unit in said
    assert "nats/token" not in said


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_error_lists_all_that_is_missing_or_malformed(tmp_path):
    broken = whole(seconds="long", budget=None)
    del broken["model"]["fingerprint"], broken["noise"]["gain"]["low"]
    broken["ladder"]["points"][1]["chosen_in"] = 1.5
    broken["trials"][3]["step"] = "count"
    broken["rate"]["rungs"] = []
    with pytest.raises(RunFolderError) as caught:
        read_search(write_search(tmp_path, broken))
    for problem in (
        "search.json: seconds: Input should be a valid number",
        "search.json: budget: Input should be a valid string",
        "search.json: model.fingerprint: Field required",
        "search.json: noise.gain.low: Field required",
        "search.json: ladder.points.1.chosen_in: Input should be less than or equal to 1",
        "search.json: trials.3.step: Input should be",
        "search.json: rate.rungs: Tuple should have at least 1 item",
    ):
        assert problem in str(caught.value)
    assert "rankwise search" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: f.update(schema=2), "schema 2, this version reads 1"),
        (lambda f: f["rate"].update(best=0.3), "rate.best: 0.3 is none of"),
        (lambda f: f["ladder"].update(chosen=7), "ladder.chosen: 7 is none of"),
        (lambda f: f["targets"].update(chosen="all"), "targets.chosen: all is none of"),
        (lambda f: f["confirm"].update(chosen=4), "confirm.chosen: 4 is none of"),
        (lambda f: f["recommendation"].update(rank=5), "recommendation.rank: 5 is none of"),
        (lambda f: f["ladder"]["points"][0].update(loss=9.0), "is not its loss − that of rank 32"),
        (
            lambda f: f["allocation"]["against"]["shuffled"].update(low=0.4),
            "allocation.against.shuffled 0.0006 lies outside",
        ),
        (lambda f: f["ship"]["control"]["delta"].update(high=-0.4), "ship.control.delta 0.0012 lies outside"),
        (lambda f: f["noise"]["gain"].update(low=0.4), "noise.gain 0.2861 lies outside 0.4 … 0.3219"),
    ],
)
def test_figures_that_contradict_each_other_are_refused(tmp_path, change, problem):
    found = whole()
    change(found)
    with pytest.raises(RunFolderError, match=re.escape(problem)):
        read_search(write_search(tmp_path, found))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"schema": 1}'])
def test_a_broken_file_is_one_error_and_keeps_the_old_page(tmp_path, text):
    (tmp_path / "search.json").write_text(text)
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(RunFolderError, match=r"search\.json"):
        write_search_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_folder_without_a_search_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"search\.json: missing"):
        read_search(tmp_path / "nowhere")


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.0, "a full run"), (0.125, "1/8 of a full run"), (12 / 97, "1/8 of a full run"), (0.01, "1.0 % of a full run")],
)
def test_lengths_are_shares_that_people_say(value, said):
    assert share(value) == said


def test_kinds_of_layers_are_told_apart_by_as_little_as_does():
    ranks = {
        "bert.encoder.layer.0.attention.output.dense": 3,
        "bert.encoder.layer.0.output.dense": 2,
        "bert.encoder.layer.1.output.dense": 1,
        "bert.encoder.layer.1.attention.self.query": 0,
        "classifier": 4,
    }
    rows = {"attention.output.dense": {0: 3}, "*.output.dense": {0: 2, 1: 1}, "query": {1: 0}}
    assert kinds(ranks) == rows
    assert outside(ranks) == {"classifier": 4}


def test_the_room_needs_no_torch():
    code = "import sys, rankwise.reports.search_page; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
