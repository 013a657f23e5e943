"""What a row says: a conversation with turns, or plain text.  The shape is recognised row by row.

shape          fields (those in brackets may be missing)       becomes
messages       messages [tools]                                the conversation
conversations  conversations [system, tools]                   ShareGPT: from/value become role/content
completion     prompt, completion [system]                     user, assistant; either may be a list of messages
instruction    instruction, output [input, system, history]    alpaca: instruction, blank line, input
text           text                                            plain text, all of it trained
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.data.fields import Fields, Shape, known_shape, shape_among, shown
from rankwise.data.problems import Problems
from rankwise.data.row import Row
from rankwise.errors import nearest

Message = dict[str, Any]


SHAPES = {
    "messages": Shape(("messages",), ("tools",)),
    "conversations": Shape(("conversations",), ("system", "tools")),
    "completion": Shape(("prompt", "completion"), ("system",)),
    "instruction": Shape(("instruction", "output"), ("input", "system", "history")),
    "text": Shape(("text",)),
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Text:
    """Plain text, every token of it trained."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order.

    Attributes:
        messages: `role` and `content` (a string), and whatever else the row had for the template, such as `tool_calls`.
        tools: descriptions of functions, for templates that print them.
        untrained: indices of assistant turns that are context only (`"weight": 0`, or part of a prompt).
        prompt: the text before the only answer, for tokenizers without a chat template; None where turns are needed.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    untrained: frozenset[int] = frozenset()
    prompt: str | None = None

    @property
    def trained(self) -> list[int]:
        """Indices of the assistant turns to learn from."""
        return [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant" and i not in self.untrained]


def shape_of(fields: Mapping[str, Any]) -> str | None:
    """The first shape of the table whose needed fields are all there and not null."""
    return shape_among(SHAPES, fields)


def read_document(row: Row, problems: Problems) -> Text | Conversation | None:
    """What a row says, or None with every reason noted: file:line, field, what was expected."""
    shape = known_shape(SHAPES, row, problems)
    if shape is None:
        return None
    reader = _Reader(row, problems)
    document = _READERS[shape](reader)
    return None if reader.failed else document


class _Reader(Fields):
    """One row being read; a method for each shape."""

    def messages(self) -> Conversation:
        return self._conversation(self._turns("messages", self._fields["messages"]))

    def conversations(self) -> Conversation:
        return self._conversation([*self._system(), *self._turns("conversations", self._fields["conversations"])])

    def completion(self) -> Conversation:
        system, prompt = self._system(), self._side("prompt", "user")
        context = [*system, *prompt]
        turns = [*context, *self._side("completion", "assistant")]
        plain = all(isinstance(self._fields[side], str) for side in ("prompt", "completion"))
        return self._conversation(turns, len(context), _paragraphs(context) if plain else None)

    def instruction(self) -> Conversation:
        given = ["instruction", *(["input"] if self._has("input") else [])]
        paragraphs = [self.string(key, self._fields[key]) or "" for key in given]
        question = {"role": "user", "content": "\n\n".join(paragraphs)}
        context = [*self._system(), *self._history(), question]
        turns = [*context, *self._side("output", "assistant")]
        return self._conversation(turns, len(context), _paragraphs(context) + "\n\n")

    def plain(self) -> Text:
        return Text(self.text("text"))

    def _conversation(self, turns: Sequence[Message], context: int = 0, prompt: str | None = None) -> Conversation:
        """The first `context` turns are never trained."""
        assistants = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        weights = {i: turns[i].pop("weight", 1) for i in assistants}
        wrong = [i for i, weight in weights.items() if weight not in (0, 1)]
        for i in wrong:
            self.wrong(f"turn {i}: 'weight'", f"is {weights[i]!r}, expected 0 or 1")
        untrained = frozenset(i for i in assistants if i < context or not weights[i])
        return Conversation(tuple(turns), self._tools(), untrained, prompt)

    def _side(self, field: str, role: str) -> list[Message]:
        """A prompt or an answer: one turn as a string, or a list of turns."""
        value = self._fields[field]
        if isinstance(value, list):
            return self._turns(field, value)
        return self._turn(field, {"role": role, "content": value})

    def _turns(self, field: str, value: Any) -> list[Message]:
        turns = self._listed(field, value)
        if not turns and not self.failed:
            self.wrong(field, "is an empty list, expected turns")
        return [turn for i, given in enumerate(turns) for turn in self._turn(f"{field}[{i}]", given)]

    def _turn(self, where: str, given: Any) -> list[Message]:
        """The turn in a list, or an empty list and a problem."""
        if not isinstance(given, Mapping):
            self.wrong(where, f"is {shown(given)}, expected an object with 'role' and 'content'")
            return []
        sharegpt = "from" in given and "role" not in given
        who, what = ("from", "value") if sharegpt else ("role", "content")
        role = self._role(f"{where}.{who}", given.get(who), sharegpt)
        turn = {key: value for key, value in given.items() if value is not None and key not in (who, what)}
        if given.get(what) is not None or not turn.get("tool_calls"):
            content = self._content(where, given, what)
            turn["content"] = content or ""
            if role == "assistant" and content is not None and not content.strip() and not turn.keys() & _SPEECH:
                self.wrong(where, "is an empty assistant turn, expected something to learn")
        return [{"role": role, **turn}]

    def _role(self, where: str, given: Any, sharegpt: bool) -> str:
        known = (*_SHAREGPT_ROLES, *ROLES) if sharegpt else ROLES
        role = _SHAREGPT_ROLES.get(given, given) if sharegpt and isinstance(given, str) else given
        if role in ROLES:
            return str(role)
        if given is None:
            self.wrong(where, f"is missing, expected one of {', '.join(known)}")
        else:
            guess = nearest(given, known) if isinstance(given, str) else ""
            self.wrong(where, f"is {shown(given)}, expected one of {', '.join(known)}{guess}")
        return ""

    def _content(self, where: str, given: Mapping[str, Any], key: str) -> str | None:
        """A string, or a list of text parts joined by line ends; None when it is neither, which is noted."""
        value = given.get(key)
        if value is None:
            guess = nearest(key, [other for other in given if isinstance(other, str)])
            self.wrong(where, f"has no {key!r}, expected a string{guess}")
            return None
        if not isinstance(value, list):
            return self.string(f"{where}.{key}", value)
        parts = []
        for i, part in enumerate(value):
            if isinstance(part, Mapping) and part.get("type", "text") == "text" and "text" in part:
                parts.append(self.string(f"{where}.{key}[{i}].text", part["text"]))
            else:
                self.wrong(f"{where}.{key}[{i}]", f'is {shown(part)}, expected {{"type": "text", "text": …}}')
                parts.append(None)
        return None if None in parts else "\n".join(map(str, parts))

    def _history(self) -> list[Message]:
        """Earlier questions and answers of an alpaca row: [[question, answer], …]."""
        turns: list[Message] = []
        for i, pair in enumerate(self._listed("history", self._fields.get("history") or [])):
            if isinstance(pair, list | tuple) and len(pair) == 2:
                turns += self._turn(f"history[{i}][0]", {"role": "user", "content": pair[0]})
                turns += self._turn(f"history[{i}][1]", {"role": "assistant", "content": pair[1]})
            else:
                self.wrong(f"history[{i}]", f"is {shown(pair)}, expected [question, answer]")
        return turns

    def _system(self) -> list[Message]:
        if not self._has("system"):
            return []
        return [{"role": "system", "content": self.string("system", self._fields["system"]) or ""}]

    def _has(self, field: str) -> bool:
        """Whether an optional field is there and says something; tables have a blank where there is nothing."""
        value = self._fields.get(field)
        return bool(value.strip() if isinstance(value, str) else value)

    def _tools(self) -> tuple[Any, ...]:
        return tuple(self._listed("tools", self._fields.get("tools") or []))

    def _listed(self, field: str, value: Any) -> list[Any]:
        """A list, or a string that holds one as JSON: what a table has in place of lists."""
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                self.wrong(field, f"begins like a list in JSON but is none: {error}")
                return []
        if isinstance(value, list):
            return value
        self.wrong(field, f"is {shown(value)}, expected a list")
        return []


_READERS: dict[str, Callable[[_Reader], Text | Conversation]] = {
    "messages": _Reader.messages,
    "conversations": _Reader.conversations,
    "completion": _Reader.completion,
    "instruction": _Reader.instruction,
    "text": _Reader.plain,
}
# With one of these an assistant turn says something even when its content is empty.
_SPEECH = {"tool_calls", "reasoning_content", "thinking", "reasoning"}


def _paragraphs(turns: Sequence[Message]) -> str:
    return "\n\n".join(turn.get("content", "") for turn in turns)
