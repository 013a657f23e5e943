"""Writes what the command line knows of itself, every verb with its options, between two marks of docs/cli.md."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from typer.main import get_command

from rankwise.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
BEGIN, END = "<!-- options: written by scripts/options.py -->\n", "<!-- end of options -->\n"
MANY = 10  # options of a verb that are wholly those of another are named together from here on


class Row(NamedTuple):
    option: str
    default: str
    meaning: str


def row(parameter: Any) -> Row:
    """The help's [default] in a column of its own."""
    told = re.search(r" \[([^\[\]]+)\]", parameter.help)
    meaning = parameter.help.replace(told[0], "") if told else parameter.help
    if told:
        default = told[1]
    elif parameter.required:
        default = "required"
    else:
        default = "–" if parameter.default is None or parameter.default is False else str(parameter.default)
    names = parameter.opts if parameter.param_type_name == "option" else []
    return Row(" ".join(filter(None, [*names, parameter.metavar])), default, meaning)


def prose(text: str) -> str:
    """A verb's docstring up to its examples, a line for each paragraph of the help."""
    said = " ".join(re.split(r"\x08|Examples?:", text)[0].split())
    return textwrap.fill(said.replace("<", "&lt;"), 128, break_on_hyphens=False)


def table(rows: list[Row]) -> str:
    cells = [(f"`{one.option}`", one.default, one.meaning) for one in rows]
    lines = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in cells]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *(f"| {line} |" for line in lines)])


def sections() -> str:
    verbs = get_command(app).commands
    rows = {name: [row(parameter) for parameter in verb.params] for name, verb in verbs.items()}
    parts = []
    for name, verb in verbs.items():
        shared = [one for one in rows[name] if name != "train" and one in rows["train"]]
        if len(shared) < MANY:
            shared = []
        own = [one for one in rows[name] if one not in shared]
        parts += [f"### {name}", prose(verb.help or ""), table(own)]
        if shared:
            named = ", ".join(f"`{one.option.split()[0]}`" for one in shared)
            parts.append(textwrap.fill(f"As in [train](#train): {named}.", 128, break_on_hyphens=False))
    return "\n\n".join(parts)


def page(text: str) -> str:
    """The page with its options as they are now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{sections()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
