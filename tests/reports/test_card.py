import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.reports.card import render, write_card
from rankwise.reports.reader import read_run
from tests.reports.folders import HOSTILE, SAMPLES, evaluation, record, write_run


def card(folder, **parts) -> tuple[dict, str]:
    """Front matter and body."""
    text = write_card(write_run(folder, **parts)).read_text(encoding="utf-8")
    _, front, body = text.split("---\n", maxsplit=2)
    return yaml.safe_load(front), body


def test_the_front_matter_is_what_hugging_face_reads(tmp_path):
    front, _ = card(tmp_path)
    assert front == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "rankwise"],
    }


@pytest.mark.parametrize("name", ["/home/ann/models/smol", "./smol", "~/smol", "C:\\models", "a/b/c", "two words"])
def test_a_base_on_somebodys_disk_is_no_hub_name(tmp_path, name):
    front, body = card(tmp_path, record=record(base={"name": name, "fingerprint": "ab"}))
    assert "base_model" not in front
    assert "/home/ann" not in body


def test_new_tokens_are_named_and_the_way_to_load_them_is_told(tmp_path):
    own = {"tokens": {"model.embed_tokens": [49152, 49153, 7]}, "new_tokens": {"<tool>": 49152, "</tool>": 49153}}
    body = card(tmp_path, record=record(**own))[1]
    assert r"model.embed\_tokens for the tokens \<tool\> (49152), \</tool\> (49153), 7." in body
    used = body[body.index("## Use") : body.index("Or without")]
    assert 'AutoTokenizer.from_pretrained("path/to/this/folder")' in used
    assert ")\nmodel.resize_token_embeddings(len(tokenizer))\nmodel = PeftModel" in used
    assert "resize_token_embeddings" not in card(tmp_path / "plain")[1]


@pytest.mark.parametrize("name", ["gpt2", "123", "true", "null", "owner/1.0"])
def test_a_hub_name_stays_a_string(tmp_path, name):
    front, _ = card(tmp_path, record=record(base={"name": name, "fingerprint": "ab"}))
    assert front["base_model"] == name


@pytest.mark.parametrize(
    "words",
    [
        "**Tuned is better than the base by 0.419 nats/token (95 % interval 0.373 … 0.461) on 214 unseen documents",
        "| base | 2.449 | 11.6 |  |  |  |",
        "| tuned | 2.030 | 7.6 | −0.419 | −0.461 … −0.373 | 200 of 214 |",
        'PeftModel.from_pretrained(model, "path/to/this/folder")',
        'AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")',
        r"| model.layers.0–29.self\_attn | q\_proj k\_proj v\_proj o\_proj | 120 | 16 | 32 | 2 |",
        "| lr | 2e-4 | ten times a full fine-tuning's rate, the middle of 1e-4 … 5e-4 |",
        "| training | 1,912 | 412,806 | 38,214 | 17 | 3 × no answer | train.jsonl (9b9b9b9b9b9b…) |",
        "| time | 2 min 41 s, 3,836 tokens/s |",
        "仁寿殿在颐和园东宫门内",
    ],
)
def test_the_numbers_of_the_run_are_said(tmp_path, words):
    assert words in card(tmp_path)[1]


def test_the_places_of_this_machine_stay_here(tmp_path):
    data = record()["data"]
    data["train"]["files"] = [{"path": "/home/ann/secret/train.jsonl", "sha256": "ab" * 32}]
    names = ("model", "valid", "test", "out", "continue_from")
    places = [*((name, f"/home/ann/secret/{name}.x") for name in names), ("data", ["/home/ann/secret/train.jsonl"])]
    settings = [{"name": name, "value": value, "reason": "asked for"} for name, value in places]
    command = "rankwise train --data /home/ann/secret/train.jsonl"
    _, body = card(tmp_path, record=record(data=data, command=command, settings=settings))
    assert "| data | train.jsonl |" in body
    assert r"| continue\_from | continue\_from.x |" in body
    assert "/home/ann" not in body


def outside_fences(body: str) -> str:
    """What Markdown reads as Markdown: a fence ends at the first line of as many backticks or more."""
    fence, kept = 0, []
    for line in body.splitlines():
        ticks = len(line) - len(line.lstrip("`"))
        if fence and ticks >= fence and not line.strip("`"):
            fence = 0
        elif not fence and ticks >= 3:
            fence = ticks
        elif not fence:
            kept.append(line)
    assert not fence
    return "\n".join(kept)


def test_hostile_samples_stay_in_their_fence(tmp_path):
    breakout = {"prompt": "p", "before": "```\n## script\n````\n## script", "after": "`", "reference": None}
    _, body = card(tmp_path, samples=[*SAMPLES[:2], breakout])
    outside = outside_fences(body)
    assert HOSTILE in body
    assert "script" not in outside
    assert "result_1" not in outside


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_stays_in_its_cell(tmp_path_factory, text):
    folder = Path(tmp_path_factory.getbasetemp()) / "any-cell"
    changed = record(settings=[{"name": "x", "value": text, "reason": f"because {text}"}], versions={})
    write_run(folder, record=changed, metrics=None, evaluation=None, samples=None)
    section = render(read_run(folder)).partition("## Every setting")[2].partition("## Data")[0]
    rows = section.strip().splitlines()[2:]
    assert len(rows) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", rows[2])) == 4
    assert not re.search(r"(?<!\\)(?:\\\\)*[<\[*`]", rows[2])


def test_every_part_of_the_data_has_its_row_and_what_was_lost_is_counted_once(tmp_path):
    data = record()["data"]
    data["test"] = data["valid"] | {"documents": 77}
    data["valid"] |= {"held_back": True, "truncated": 0}
    _, body = card(tmp_path, record=record(data=data))
    assert "| test | 77 |" in body
    assert "| validation | 214 | 412,806 | 38,214 | – | counted with training |" in body


def test_a_run_without_evaluation_claims_nothing(tmp_path):
    _, body = card(tmp_path, metrics=None, evaluation=None, samples=None)
    assert "Not compared with the base" in body
    assert "Not measured on any document" in body
    assert "## Base against tuned" not in body


def test_an_adapter_without_a_run_has_a_card(tmp_path):
    names = ("schema", "spec", "base", "digest", "parameters", "sites")
    bare = {name: record()[name] for name in names}
    _, body = card(tmp_path, record=bare, metrics=None, evaluation=None, samples=None)
    assert "4,884,480 parameters" in body
    assert "## Training" not in body


def test_every_adapter_has_its_row(tmp_path):
    _, body = card(tmp_path, evaluation=evaluation(names=("r8", "r16")))
    assert re.search(r"^\| r8 \| .* of 214 \|$", body, flags=re.MULTILINE)
    assert re.search(r"^\| r16 \| .* of 214 \|$", body, flags=re.MULTILINE)
