"""`rankwise chat`."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on
from rankwise.cli.options import Force, Json, Model, Rank, Storage

_HELP = "/reset forgets what was said, /exit leaves"
_SWITCHING = "/use NAME switches (/use base, /use a=0.7,b=0.3), /compare A B has both answer the next line, /list lists"
_COMMAND = re.compile(r"/[a-z]+(?=\s|$)")
_GAP = 3  # columns between two answers


def chat(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DIR", help="Talk to this adapter, not the base; may be repeated."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always gives the likeliest answer.")] = 0.0,
    rank: Rank = None,
    storage: Storage = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Talk to the base or to adapters, a line at a time.

    /use NAME switches to another adapter on the same base, /use base to the base alone, /use a=0.7,b=0.3 to a weighted
    mix, /use NAME@4 to the first four ranks of a nested one.  /compare A B has both answer the next line.  /list tells
    who is there, /reset forgets what was said, /exit leaves.  With --json every answer is a JSON object on a line of
    its own.

    Examples:
      rankwise chat --model ./SmolLM2-135M-Instruct --adapter runs/chats
      rankwise chat --model ./SmolLM2-135M-Instruct --adapter chats=runs/chats --adapter docs=runs/docs
    """
    from rankwise.jobs.chat import Chat, named_adapters

    with looking_on(json) as watch:
        manner: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "storage": storage}
        talk = Chat(model, named_adapters(adapter or []), watch, force=force, **manner)
        if rank is not None:
            talk.use(f"{talk.speaking}@{rank}")
        watch.say(_HELP)
        if talk.adapters:
            watch.say(_SWITCHING)
        _Talk(talk, watch, as_json=json).go()


class _Talk:
    """Lines in, answers out; `asked` are those who answer the next line beside each other."""

    def __init__(self, talk: Any, watch: Any, *, as_json: bool) -> None:
        self.talk, self.watch, self.as_json = talk, watch, as_json
        self.asked: tuple[str, ...] = ()

    def go(self) -> None:
        import sys

        from rankwise.errors import RankwiseError

        prompted = not self.as_json and sys.stdin.isatty()
        while True:
            who = self.talk.speaking if self.talk.adapters else ""
            try:
                line = input(f"{who}> " if prompted else "").strip()
            except EOFError:
                return
            if line == "/exit":
                return
            try:
                self.take(line)
            except RankwiseError as error:  # of a name or a mix: the conversation goes on
                self.tell({"error": error.message, "hint": error.hint}, error.message)

    def take(self, line: str) -> None:
        """Raises:
        RankwiseError: nobody of that name is there.
        """
        command = _COMMAND.match(line)
        if command is not None:
            self.obey(command[0], line[command.end() :].split())
        elif line and self.asked:
            self.compare(line)
        elif line and self.as_json:
            self.say({"role": "assistant", "adapter": self.talk.speaking, "content": self.talk.reply(line)})
        elif line:
            self.talk.reply(line, say=lambda text: print(text, end="", flush=True))
            print()

    def obey(self, command: str, words: list[str]) -> None:
        if command == "/reset" and not words:
            self.talk.reset()
        elif command == "/use" and len(words) == 1:
            self.talk.use(words[0])
            self.tell({"using": words[0]}, f"{words[0]} answers from now on")
        elif command == "/compare" and len(words) == 2:
            for word in words:
                self.talk.way(word)
            self.asked = (words[0], words[1])
            self.tell({"comparing": words}, f"{words[0]} and {words[1]} answer the next line")
        elif command == "/list" and not words:
            self.tell_who()
        else:
            told = f"{' '.join([command, *words])}: not understood; {_HELP}; {_SWITCHING}"
            self.tell({"error": told, "hint": None}, told)

    def tell_who(self) -> None:
        folders = {name: str(folder) for name, folder in self.talk.adapters.items()}
        rows = [("base", self.talk.base.name), *folders.items()]
        if self.talk.speaking not in dict(rows):
            rows.append((self.talk.speaking, "some of its ranks" if "@" in self.talk.speaking else "a mix"))
        told = [f"{'*' if name == self.talk.speaking else ' '} {name}  {place}" for name, place in rows]
        self.tell({"using": self.talk.speaking, "adapters": folders}, "\n".join(told))

    def compare(self, line: str) -> None:
        asked, self.asked = self.asked, ()
        found = self.talk.compared(line, asked)
        pairs = [{"adapter": name, "content": text} for name, text in zip(asked, found, strict=True)]
        if self.as_json:
            self.say({"role": "assistant", "compared": pairs})
        else:
            print(beside(asked, found), flush=True)

    def tell(self, value: dict[str, Any], text: str) -> None:
        """What is no answer: for machines among the answers, for people beside them."""
        from rankwise.texts import plain

        if self.as_json:
            self.say(value)
        else:
            self.watch.say(plain(text))

    @staticmethod
    def say(value: dict[str, Any]) -> None:
        import json

        print(json.dumps(value, ensure_ascii=False), flush=True)


def beside(names: tuple[str, ...], texts: list[str], width: int | None = None) -> str:
    """Answers in columns under their names."""
    import shutil
    import textwrap
    from itertools import zip_longest

    each = ((width or shutil.get_terminal_size().columns) - _GAP * (len(texts) - 1)) // len(texts)
    columns = []
    for name, text in zip(names, texts, strict=True):
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, max(8, each)) or [""]]
        columns.append([name, "-" * min(max(8, each), len(name)), *lines])
    gap = " " * _GAP
    rows = (gap.join(cell.ljust(each) for cell in row).rstrip() for row in zip_longest(*columns, fillvalue=""))
    return "\n".join(rows)
