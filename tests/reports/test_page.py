import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import RunFolderError
from rankwise.reports.page import render, write_report
from rankwise.reports.reader import read_run
from tests.reports.folders import HOSTILE, evaluation, metrics, record, write_run

SECTIONS = ("curves", "comparison", "documents", "samples", "adapter", "settings", "data", "reproduce")
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Tags, ids, links and words, and whether every tag that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value for attribute, value in self.attributes if attribute == name]


def report(folder, **parts) -> str:
    return write_report(write_run(folder, **parts)).read_text(encoding="utf-8")


def test_every_section_is_there_in_order(page):
    ids = Page(page).values("id")
    assert [identity for identity in ids if identity in SECTIONS] == list(SECTIONS)
    assert ids.index("verdict") < ids.index("curves")


@pytest.mark.parametrize(
    "words",
    [
        "Tuned is better than the base by 0.419 nats/token",
        "base 2.449",
        "best 2.083",
        "training, mean of 19 steps",
        "200 better (93 %)",
        "14 worse (7 %)",
        "nine in ten lie between −0.861 and +0.048",
        "4,884,480 parameters at 210 layers",
        "model.layers.0–29.self_attn q_proj k_proj v_proj o_proj 120 16 32 2",
        "lr 2e-4 ten times a full fine-tuning's rate",
        "training 1,912 412,806 38,214 17 3 × no answer",
        "sha256 " + "9b" * 32,
        "fingerprint " + "5f0c" * 16,
        "rankwise train --model SmolLM2 --data train.jsonl",
        "torch 2.13.0",
        "processor AMD EPYC 9R14",
        "in 2 min 41 s; peak memory 1.21 GB",
        "learning rate",
        "gradient norm",
        "仁寿殿在颐和园东宫门内",
    ],
)
def test_the_numbers_of_the_run_are_said(page, words):
    assert words in Page(page).text.replace("\u00a0", " ")


def test_hostile_text_is_text(page):
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert page.count("<script") == 0
    assert HOSTILE in parsed.text
    assert "</pre></div></style></textarea>" in parsed.text


@settings(max_examples=20, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_is_text(tmp_path_factory, text):
    folder = Path(tmp_path_factory.getbasetemp()) / "any-text"
    samples = [{"prompt": text, "before": f"<b {text}", "after": f'"><img src=x>{text}', "reference": None}]
    changes = {"command": text, "machine": {text: text}, "settings": [{"name": text, "value": [text], "reason": text}]}
    write_run(folder, record=record(**changes), metrics=None, evaluation=None, samples=samples)
    parsed = Page(render(read_run(folder)))
    assert "img" not in parsed.tags
    assert "script" not in parsed.tags


def test_nothing_is_fetched_and_nothing_runs(page):
    parsed = Page(page)
    assert {"script", "img", "iframe", "object", "embed", "video", "audio"}.isdisjoint(parsed.tags)
    assert parsed.values("src") == []
    assert all(link.startswith(("#", "data:")) for link in parsed.values("href"))
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"url\((?!#)|@import", page)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in parsed.values("content")


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = Page(page).values("id")
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="|url\()#([\w.-]+)', page))
    assert len(wanted) > 10
    assert wanted <= set(ids)


def test_nothing_is_nan(page, tmp_path):
    lines = metrics(30)
    for line in lines[::3]:
        line["loss"] = math.nan
    for line in lines[1::3]:
        line |= {"lr": math.inf, "grad_norm": -math.inf} if line["kind"] == "step" else {}
    for text in (page, report(tmp_path, metrics=lines)):
        assert not re.search(r"\b(nan|inf|NaN|Infinity|Undefined)\b", text)


def test_every_colour_of_a_plot_is_in_the_stylesheet_light_and_dark(page):
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    light, dark = _themes(page)
    colours = used - {"sans", "mono", "shade"}
    assert colours <= light.keys()
    assert dark.keys() == {name for name in light if light[name].startswith("#")}


def test_words_stand_out_in_both_themes(page):
    for theme in _themes(page):
        for ground in ("paper", "surface"):
            for ink in ("ink", "muted", "tuned", "worse"):
                assert _contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground, theme[ink])
            for line in ("train", "series-2", "series-3", "series-4"):
                assert _contrast(theme[line], theme[ground]) >= 3, (line, ground, theme[line])


def _themes(page: str) -> tuple[dict[str, str], dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)[:2]
    return tuple(dict(re.findall(r"--([\w-]+): ([^;]+);", block)) for block in (light, dark))


def _contrast(a: str, b: str) -> float:
    """WCAG 2.1, relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_run_stopped_early_says_so(tmp_path):
    training = record()["training"] | {"steps": 120, "stopped": "interrupted", "best_step": None}
    text = report(tmp_path, record=record(training=training), metrics=metrics(120), evaluation=None, samples=None)
    said = Page(text).text
    assert "Not compared with the base" in said
    assert "this folder holds no evaluation.json" in said
    assert "No samples were written" in said
    assert "2.67 → 1.89" in said.replace("\u00a0", " ")
    assert 'id="loss-wide-title"' in text


def test_an_adapter_without_a_run_still_has_a_page(tmp_path):
    names = ("schema", "spec", "base", "digest", "parameters", "sites")
    bare = {name: record()[name] for name in names}
    said = Page(report(tmp_path, record=bare, metrics=None, evaluation=None, samples=None)).text
    assert "No step was recorded" in said
    assert "4,884,480 parameters" in said


def test_one_step_and_one_document_make_a_page(tmp_path):
    text = report(tmp_path, metrics=metrics(1, every=1), evaluation=evaluation(1))
    assert "Too few documents to tell" in text
    loss = text.partition('id="loss-wide-title"')[2].partition("</svg>")[0]
    assert "fill: var(--train)" in loss  # a dot: a line of one point is nothing
    assert "mean of" not in Page(text).text.partition("Base against tuned")[0]


@pytest.mark.parametrize("kind", ["step", "evaluation", "event"])
def test_metrics_of_one_kind_make_a_page(tmp_path, kind):
    event = {"kind": "event", "step": 9, "what": "skipped", "rows": ["train.jsonl:7"]}
    lines = [line for line in [*metrics(50), event] if line["kind"] == kind]
    text = report(tmp_path, metrics=lines)
    assert ("1 event on the way" in text) == (kind == "event")
    assert ("train.jsonl:7" in text) == (kind == "event")
    assert ("No step was recorded" in text) == (kind == "event")


def test_several_adapters_each_have_a_curve_and_a_row(tmp_path):
    lines = [line for name in ("r8", "r16") for line in metrics(40, name)]
    text = report(tmp_path, metrics=lines, evaluation=evaluation(names=("r8", "r16")))
    said = Page(text).text
    assert "Of r8." in said
    assert re.search(r"r16: −0\.\d+", said)
    assert "var(--series-2)" in text


def test_documents_without_any_change_make_a_page(tmp_path):
    found = evaluation()
    found["per_document"]["adapters"]["tuned"] = found["per_document"]["base"]
    found["adapters"][0] |= {"loss": found["base"]["loss"], "delta": {"mean": 0, "low": 0, "high": 0}}
    said = Page(report(tmp_path, evaluation=found)).text
    assert "214 unchanged" in said


def test_a_wild_step_does_not_flatten_the_curve(tmp_path):
    lines = metrics(300)
    lines[150] |= {"loss": 5000.0}
    text = report(tmp_path, metrics=lines)
    assert re.search(r"\d steps? lost more than the frame shows", text)
    ticks = re.search(r'id="loss-wide-title".*?</svg>', text, flags=re.DOTALL)
    assert ticks is not None
    assert {"1.8", "2.0", "2.2"} <= set(re.findall(r">([\d.]+)</text>", ticks[0]))


def test_a_long_run_is_a_small_page(tmp_path):
    text = report(tmp_path, metrics=metrics(2000), evaluation=evaluation(5000))
    assert len(text.encode()) < 400_000


def test_a_model_that_never_stops_talking_is_cut(tmp_path):
    samples = [{"prompt": "p", "before": "la " * 400_000, "after": "a", "reference": None}]
    text = report(tmp_path, evaluation=None, samples=samples)
    assert len(text.encode()) < 200_000
    assert "1,188,000 more characters" in text


def test_the_same_folder_makes_the_same_page(page, tmp_path):
    assert report(tmp_path / "docstrings") == page


def test_the_page_replaces_the_old_one_whole(tmp_path):
    write_run(tmp_path, metrics=None, evaluation=None, samples=None)
    (tmp_path / "report.html").write_text("old")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text().startswith("<!doctype html>")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rankwise.json", "report.html"]


def test_a_folder_that_cannot_be_read_keeps_its_old_page(tmp_path):
    write_run(tmp_path, record=record(parameters="many"))
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(RunFolderError):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


def test_the_room_needs_no_torch_and_the_card_no_plots():
    code = (
        "import sys, json, rankwise.reports.card; a = set(sys.modules); "
        "import rankwise.reports.page; b = set(sys.modules); "
        "print(json.dumps(['torch' in b, 'transformers' in b, 'matplotlib' in a, 'matplotlib' in b]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False, False, True]
