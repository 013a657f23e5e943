"""A chat template is a program from the internet: it is tried on a probe, within limits, before it meets data.

transformers renders templates in jinja's sandbox, which keeps them from the machine but not from its time and memory.
Here the same program runs with a clock in every loop and a bound on everything it builds.
"""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import Any

from jinja2 import Template as Program
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from rankwise.errors import DataError

_SECONDS = 1.0
_LARGEST = 1_000_000  # characters, items or bits; what the probes need is a few thousand characters

_TURNS = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well, thank you."}] * 4
_PROBES = (_TURNS[:1], _TURNS, [{"role": "system", "content": "Be kind."}, *_TURNS])
_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}


@lru_cache(maxsize=64)
def try_template(text: str) -> None:
    """Nothing, when the template is done with every probe within the limits.

    What it refuses, or cannot do, is not judged here: rendering a row tells that better.

    Raises:
        DataError: it runs for over a second or builds something of over a million parts.
    """
    environment = _Limited()
    try:
        program = environment.program(text)
    except TemplateError:
        return
    for probe in _PROBES:
        for prompt in (True, False):
            try:
                _run(environment, program, messages=probe, add_generation_prompt=prompt)
            except (_TooMuchError, MemoryError) as error:
                raise DataError(
                    f"the chat template is refused: {error or 'it takes all memory'}",
                    hint="it came with the model; read its chat_template before using that model for anything",
                ) from None
            except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError):
                continue


def _run(environment: _Limited, program: Program, **values: object) -> None:
    environment.deadline = time.monotonic() + _SECONDS
    size = 0
    for piece in program.generate(**_NAMES, **values):
        size += len(piece)
        environment.allow(size)
        environment.tick()


class _TooMuchError(Exception):
    """A limit was passed."""


class _Limited(ImmutableSandboxedEnvironment):
    """A sandbox in which loops look at the clock and results are measured."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # Not optimised: constants would be computed while compiling, before anything is measured.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self.deadline = 0.0
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": time.strftime}
        self.filters["tojson"] = _tojson

    def program(self, text: str) -> Program:
        tree = _Measured().visit(self.parse(text))
        tree.set_environment(self)
        return Program.from_code(self, self.compile(tree), self.globals)

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise _TooMuchError(f"it was not done with a short conversation after {_SECONDS:g} s")

    def measured(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict):
            self.allow(len(value))
        elif isinstance(value, int):
            self.allow(value.bit_length())
        return value

    def allow(self, size: int) -> None:
        if size > _LARGEST:
            raise _TooMuchError(f"it makes over {_LARGEST:,} characters out of a short conversation")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "*":
            sized, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int):
                self.allow(sized.bit_length() + times.bit_length() if isinstance(sized, int) else _len(sized) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.allow(left.bit_length() * right)
        return self.measured(super().call_binop(context, operator, left, right))


class _Measured(NodeTransformer):
    """Puts a look at the clock into every body that may run again, and a measurement around what can grow."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        match node:
            case nodes.CallBlock() | nodes.FilterBlock() | nodes.AssignBlock():
                # Their call or filter must stay one; only what is between their tags is changed.
                node.body = [changed for child in node.body for changed in self.visit_list(child)]
                return node
            case nodes.For() | nodes.Macro():
                self.generic_visit(node)
                node.body.insert(0, nodes.ExprStmt(_call("tick")).set_lineno(node.lineno))
                return node
            case nodes.Call() | nodes.Filter() | nodes.Concat():
                self.generic_visit(node)
                return _call("measured", node).set_lineno(node.lineno)
            case _:
                return self.generic_visit(node)


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class _Generation(Extension):
    """transformers' tag around what the model writes; only its body matters here."""

    tags = {"generation"}  # noqa: RUF012 — jinja's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, **options)


def _len(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 1
