"""What each verb prints: results on standard output, everything else on standard error."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.jobs.world import read, write_adapter, write_rows

COMMAND = shutil.which("rankwise", path=Path(sys.executable).parent)
QUICK = ["--max-steps", 2, "--batch-tokens", 300, "--dtype", "float32"]


def environment(**more: str) -> dict[str, str]:
    """As outside of tests: standard output is buffered, one thread is enough."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "NO_COLOR")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def in_a_process(*arguments: object) -> subprocess.CompletedProcess:
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


# ── train ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_train_prints_one_object_and_not_a_word_more(world, tmp_path):
    """A whole process: what other libraries print while they are loaded counts too."""
    done = in_a_process(
        *("train", "--model", world / "llama", "--data", world / "train.jsonl", "--out", tmp_path / "out"),
        *(*QUICK, "--json"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {"out", "report", "spec", "verdict", "training", "evaluation", "samples"} <= found.keys()
    assert found["training"] == read(tmp_path / "out" / "rankwise.json")["training"]


def test_train_tells_people_what_happens_on_standard_error(rankwise, world, tmp_path):
    out = tmp_path / "[red]out"  # looks like markup, is a name
    ran = rankwise("train", "--model", world / "llama", "--data", world / "train.jsonl", "--out", out, *QUICK)
    assert ran.code == 0
    assert ran.out == ""
    for piece in (
        "2 × q_proj: rank 16",
        "asked for",
        "step 2: loss",
        "validation loss",
        "Too few documents",
        "2 steps",
    ):
        assert piece in ran.err
    assert f"report: {out}/report.html" in ran.err
    assert f"out             {out}" in ran.err
    assert "\x1b" not in ran.err


def test_options_go_before_the_file(rankwise, world, tmp_path):
    config = tmp_path / "run.yaml"
    told = {"model": str(world / "gpt2"), "data": str(world / "train.jsonl"), "rank": 2, "lr": 1e-3, "max-steps": 1}
    config.write_text(yaml.safe_dump(told | {"targets": "c_attn", "dtype": "float32"}))
    ran = rankwise("train", "--config", config, "--rank", 3, "--out", tmp_path / "out", "--json")
    assert ran.code == 0
    assert ran.json["spec"] | {"rank": 3, "alpha": 6.0, "targets": ["c_attn"]} == ran.json["spec"]
    rows = {row["name"]: row["value"] for row in read(tmp_path / "out" / "rankwise.json")["settings"]}
    assert (rows["lr"], rows["max_steps"], rows["model"]) == (1e-3, 1, str(world / "gpt2"))


def test_fewer_layers_by_command_and_by_file(rankwise, world, tmp_path):
    (tmp_path / "run.yaml").write_text("exclude: [up_proj, layers.1.mlp.gate_proj]\nlayers: 1-\n")
    line = ("train", "--model", world / "llama", "--data", world / "train.jsonl", *QUICK)
    one = rankwise(*line, "--out", tmp_path / "a", "--exclude", "up_proj,layers.1.mlp.gate_proj", "--layers", "1-")
    other = rankwise(*line, "--out", tmp_path / "b", "--config", tmp_path / "run.yaml")
    assert (one.code, other.code) == (0, 0)
    record = read(tmp_path / "a" / "rankwise.json")
    want = [f"model.layers.1.{name}" for name in ("mlp.down_proj", *(f"self_attn.{x}_proj" for x in "kqvo"))]
    assert sorted(record["sites"]) == sorted(want)
    assert (record["spec"]["exclude"], record["spec"]["layers"]) == (["up_proj", "layers.1.mlp.gate_proj"], "1-")
    assert record["digest"] == read(tmp_path / "b" / "rankwise.json")["digest"]
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "| exclude | up\\_proj, layers.1.mlp.gate\\_proj | asked for |" in card
    assert "| layers | 1- | asked for |" in card


def test_new_tokens_by_command(rankwise, world, tmp_path):
    for name, numbers in (("train", range(100, 130)), ("test", range(300, 306))):
        rows = [{"prompt": f"what is {n}?", "completion": f"<tool>say {n}</tool>"} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, line = tmp_path / "out", ("--model", world / "tied")
    ran = rankwise(
        "train", *line, "--data", tmp_path / "train.jsonl", "--out", out, "--add-tokens", "<tool>,</tool>", *QUICK
    )
    assert (ran.code, "<tool> × " in ran.err) == (0, True)
    found = rankwise("evaluate", *line, "--data", tmp_path / "test.jsonl", "--adapter", out, "--json")
    assert (found.code, found.err, found.json["documents"]) == (0, "", 6)
    merged = rankwise("merge", *line, "--adapter", out, "--out", tmp_path / "merged")
    assert "14 layers and rows of 2 tokens merged" in merged.out
    said = rankwise("chat", *line, "--adapter", out, "--max-new-tokens", 4, "--json", said="a <tool> b\n")
    assert said.json["role"] == "assistant"
    size = read(world / "tied" / "config.json")["vocab_size"]
    assert f"model.embed_tokens               rows of tokens {size}, {size + 1}" in rankwise("inspect", out).out
    again = rankwise("inspect", tmp_path / "merged", "--json")
    assert again.json["sites"]["model.embed_tokens"]["shape"][1] == size + 2


def test_training_further_by_command(rankwise, world, adapter, tmp_path):
    data = ["--data", world / "train.jsonl", "--valid", world / "valid.jsonl", "--test", world / "test.jsonl"]
    line = ["train", "--model", world / "llama", *data, "--continue-from", adapter, "--out", tmp_path / "out"]
    ran = rankwise(*line, *QUICK, "--json")
    assert ran.code == 0
    assert ran.json["evaluation"]["documents"] == 12
    assert ran.json["spec"]["rank"] == 4


# ── evaluate, merge, inspect, doctor ─────────────────────────────────────────────────────────────────────────────────


def test_evaluate_for_machines_and_for_people(rankwise, world, adapter, run):
    line = ["evaluate", "--model", world / "llama", "--data", world / "test.jsonl", "--dtype", "float32"]
    line += ["--adapter", adapter, "--adapter", run["out"]]
    found = rankwise(*line, "--json")
    assert (found.code, found.err) == (0, "")
    assert [one["name"] for one in found.json["adapters"]] == ["adapter", "run"]
    shown = rankwise(*line)
    assert shown.code == 0
    rows = re.findall(r"^(\S+) +(\d\.\d{4})", shown.out, re.M)
    losses = {"base": found.json["base"]["loss"]} | {one["name"]: one["loss"] for one in found.json["adapters"]}
    assert rows == [(name, f"{loss:.4f}") for name, loss in losses.items()]
    assert "12 documents" in shown.err
    assert "\x1b" not in shown.out + shown.err


@pytest.mark.filterwarnings("default::rankwise.errors.RankwiseWarning")
def test_a_warning_is_a_sentence(rankwise, world, tmp_path):
    fresh = write_adapter(tmp_path / "fresh", world / "llama", size=0)
    line = ["evaluate", "--model", world / "llama", "--data", world / "test.jsonl", "--adapter", fresh]
    ran = rankwise(*line, "--json")
    assert ran.err == f"warning: {fresh}: ΔW is zero at every site; the adapter changes nothing\n"
    assert ran.json["adapters"][0]["delta"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_merge_for_machines_and_for_people(rankwise, world, adapter, tmp_path):
    line = ["merge", "--model", world / "llama", "--adapter", adapter]
    found = rankwise(*line, "--out", tmp_path / "one", "--json")
    assert (found.code, found.err) == (0, "")
    assert found.json["out"] == str(tmp_path / "one")
    assert found.json["logits_error"] <= found.json["tolerance"]
    shown = rankwise(*line, "--out", tmp_path / "two")
    assert f"{tmp_path / 'two'}: 14 layers merged, stored as float32" in shown.out
    assert "proving what was written" in shown.err


def test_compress_for_machines_and_for_people(rankwise, world, run, tmp_path):
    unseen = write_rows(tmp_path / "unseen.jsonl", range(300, 340))
    line = ["compress", run["out"], "--model", world / "llama", "--data", unseen, "--dtype", "float32"]
    found = rankwise(*line, "--out", tmp_path / "one", "--tolerance", "50%", "--json")
    assert (found.code, found.err) == (0, "")
    assert found.json["out"] == str(tmp_path / "one")
    count = found.json["parameters"]
    assert read(tmp_path / "one" / "rankwise.json")["parameters"] == count["compressed"] < count["whole"]
    shown = rankwise(*line, "--out", tmp_path / "two", "--tolerance", "50%")
    assert shown.code == 0
    losses = dict(re.findall(r"^(\w+) +(\d\.\d{4})$", shown.out, re.M))
    assert losses == {name: f"{loss:.4f}" for name, loss in found.json["losses"].items()}
    ranks = found.json["ranks"].values()
    for piece in (
        f"{tmp_path / 'two'}: {count['compressed']:,} of {count['whole']:,} parameters",
        f"ranks {min(ranks)} to {max(ranks)} at {len(ranks)} layers",
        f"{found.json['tolerance']:.4f} were allowed (20 documents decided)",
        f"report: {tmp_path / 'two'}/report.html",
    ):
        assert piece in shown.out
    assert "of the parameters, second half" in shown.err
    assert "\x1b" not in shown.out + shown.err


@pytest.mark.filterwarnings("default::rankwise.errors.RankwiseWarning")
def test_inspect_for_machines_and_for_people(rankwise, world, run, tmp_path):
    found = rankwise("inspect", run["out"], "--json").json
    shown = rankwise("inspect", run["out"])
    assert (shown.code, shown.err) == (0, "")
    for path, site in found["sites"].items():
        assert [path, "16", "2", f"{site['delta_norm']:.4g}"] in [row.split() for row in shown.out.splitlines()]
    assert f"base: {world / 'llama'} (fingerprint {found['base']['fingerprint'][:12]}…)" in shown.out
    assert "changes nothing" not in shown.out
    write_adapter(tmp_path, world / "llama", size=0)
    assert "this adapter changes nothing" in rankwise("inspect", tmp_path).out
    assert "all-linear    14 layers" in rankwise("inspect", world / "llama").out
    assert rankwise("inspect", world / "llama", "--json").json["kind"] == "model"


def test_doctor_says_that_all_is_well(rankwise):
    found = rankwise("doctor", "--json")
    assert (found.code, found.err) == (0, "")
    assert found.json["well"] is True
    shown = rankwise("doctor")
    assert shown.code == 0
    assert shown.out.endswith("all well\n")


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_scripted_chat_answers_a_line_with_a_line(rankwise, world, run):
    line = ["chat", "--model", world / "llama", "--adapter", run["out"], "--max-new-tokens", 8, "--json"]
    said = rankwise(*line, said="hello\n\nand you?\n/reset\nhello\n/exit\nnever asked\n")
    assert (said.code, said.err) == (0, "")
    answers = [json.loads(one) for one in said.out.splitlines()]
    assert [one["role"] for one in answers] == 3 * ["assistant"]
    assert answers[0] == answers[2] != answers[1]


def test_a_scripted_chat_switches_compares_and_lists_adapters_on_one_base(rankwise, world, run, adapter):
    line = ["chat", "--model", world / "llama", "--adapter", f"mine={run['out']}", "--adapter", adapter]
    asked = "/list\nhello\n/reset\n/compare mine base\nhello\n/reset\n/use base\nhello\n/use nobody\n/use\n/usr/bin\n"
    said = rankwise(*line, "--max-new-tokens", 8, "--json", said=asked)
    assert (said.code, said.err) == (0, "")
    told = [json.loads(one) for one in said.out.splitlines()]
    assert told[0] == {"using": "mine", "adapters": {"mine": str(run["out"]), "adapter": str(adapter)}}
    first, comparing, both, using, bare, nobody, misused, path = told[1:]
    assert (first["role"], first["adapter"]) == ("assistant", "mine")
    assert comparing == {"comparing": ["mine", "base"]}
    assert [one["adapter"] for one in both["compared"]] == ["mine", "base"]
    assert [one["content"] for one in both["compared"]] == [first["content"], bare["content"]]
    assert using == {"using": "base"}
    assert "nobody" in nobody["error"]
    assert nobody["hint"] == "the bank holds: mine, adapter"
    assert "not understood" in misused["error"]
    assert path["role"] == "assistant"  # a path is no command


def test_two_answers_stand_side_by_side_for_people(rankwise, world, run):
    line = ["chat", "--model", world / "llama", "--adapter", run["out"], "--max-new-tokens", 8]
    said = rankwise(*line, said="/list\n/compare run base\nhello\n/use base\n/use x\nhello\n")
    assert said.code == 0
    assert re.match(r"run +base\n--- +----\n", said.out)
    assert "* run  " in said.err
    assert "base answers from now on" in said.err
    assert "no adapter 'x'" in said.err


def test_a_chat_ends_politely_when_nothing_more_is_said(rankwise, world):
    said = rankwise("chat", "--model", world / "llama", "--max-new-tokens", 4, said="hello")
    assert said.code == 0
    assert said.out.endswith("\n")
    assert ">" not in said.out.splitlines()[0][:1]  # nobody is there to be prompted
    assert "/reset forgets what was said, /exit leaves" in said.err
    silent = rankwise("chat", "--model", world / "llama", said="")
    assert (silent.code, silent.out) == (0, "")


# ── pipes, terminals, signals ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_a_reader_who_has_seen_enough_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, env=environment(), check=False)
    os.close(writer)
    assert done.stderr == b""


def test_a_long_result_can_be_cut_by_head():
    line = f"{COMMAND} train --help | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment(), check=False)
    assert (done.stdout, done.stderr) == ("Usage: rankwise train [OPTIONS]\n", "")


def test_a_full_disk_behind_the_result_is_told_in_a_sentence():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: ")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_means_no_colour_on_a_terminal_either(rankwise, world, adapter, monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    line = ["evaluate", "--model", world / "llama", "--data", world / "test.jsonl", "--adapter", adapter]
    ran = rankwise(*line, terminal=True)
    assert ran.code == 0
    styles = [int(one) for many in re.findall(r"\x1b\[([0-9;]*)m", ran.err) for one in many.split(";") if one]
    coloured = any(30 <= style <= 49 or style >= 90 for style in styles)
    assert coloured is not no_color


class Signalling(io.StringIO):
    """A standard input from which a signal comes in place of a line."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def readline(self, *_: int) -> str:
        os.kill(os.getpid(), self.number)
        return ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_any_verb_with_its_code_and_without_a_traceback(rankwise, world, number, code):
    before = signal.getsignal(number)
    ran = rankwise("chat", "--model", world / "llama", "--json", said=Signalling(number))
    assert (ran.code, ran.out, ran.err) == (code, "", "stopped\n")
    assert signal.getsignal(number) is before
