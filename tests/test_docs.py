"""What the pages say can be done, done: their Python is run, their commands are read by the command line itself."""

import re
import shlex
from pathlib import Path
from runpy import run_path

import pytest
import typer

from rankwise.cli.app import app
from tests.jobs.tasks import write_task
from tests.jobs.world import write_model, write_rows
from tests.models import ARCHITECTURES, TASKS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
VERBS = typer.main.get_command(app).commands


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.startswith("rankwise ")
]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_python_of_the_readme_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "model")
    write_rows(tmp_path / "chats.jsonl", range(40))
    (code,) = blocks(ROOT / page, "python")
    exec(code.replace("path/or/hub-id", "./model"), {})
    assert "'delta': {'mean':" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_the_python_of_the_library_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    exec("\n".join(blocks(ROOT / "docs" / "library.md", "python")).replace("path/or/hub-id", "./model"), space := {})
    assert space["tuned"]["eval_loss"] < space["base"]["eval_loss"]
    assert {path.parent.name for path in tmp_path.glob("out/*/adapter_config.json")} == {"task", "prefers"}


def test_the_python_of_the_tasks_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    files = write_task(tmp_path, "sequence-classification")
    files["data"].rename("train.jsonl")
    (code,) = blocks(ROOT / "docs" / "tasks.md", "python")
    exec(code.replace("path/to/bert", str(files["model"])), {})
    assert "'reference': 'class frequencies'" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_on_a_page_is_one(page, line):
    _, verb, *words = shlex.split(line)
    VERBS[verb].make_context(verb, words).close()


def test_both_readmes_show_the_same_commands():
    def shown(page):
        return [line.split("  ")[0] for line in blocks(ROOT / page, "sh")[1].splitlines()]

    assert [re.sub("路径或ID", "PATH_OR_ID", line) for line in shown("README.zh-CN.md")] == shown("README.md")


def test_the_command_line_page_has_every_option_as_it_is():
    script = run_path(str(ROOT / "scripts" / "options.py"))
    text = script["PAGE"].read_text(encoding="utf-8")
    assert text == script["page"](text), "docs/cli.md is behind: run .venv/bin/python scripts/options.py"
    for verb, command in VERBS.items():
        section = text.split(f"\n### {verb}\n")[1].split("\n### ")[0]
        assert not [name for one in command.params for name in one.opts if name not in section and name[0] == "-"]


def test_the_number_of_architectures_is_what_the_tests_know():
    known = {*ARCHITECTURES, *(name for models in TASKS.values() for name in models)} - {"llama-tied", "unet"}
    said = (ROOT / "docs" / "surgery.md").read_text(encoding="utf-8")
    assert f"The tests know {len(known)} of transformers' architectures" in said


def test_every_link_between_pages_leads_somewhere():
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)}: {target}")
    assert not missing
