"""Sizes of files and functions; fails above the limits: 400 lines a file, 60 lines a function, 8 arguments.

Docstrings and comments count: a function that needs two screens to read is too long, whatever fills them.  Command
line verbs may have as many arguments as they have options.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES, ARGUMENTS = 400, 60, 8
ROOTS = ("rankwise", "tests", "examples", "benchmarks", "scripts")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    yield from (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, Function))


def arguments(function: Function) -> int:
    found = function.args
    named = [argument.arg for argument in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls", "ctx")])


def main() -> None:
    files = sorted(path for root in ROOTS for path in Path(root).rglob("*.py"))
    lines = {path: path.read_text("utf-8").count("\n") for path in [*files, *sorted(Path("rankwise").rglob("*.[ch]"))]}
    sized = [(f.end_lineno - f.lineno + 1, path, f) for path in files for f in functions(path) if f.end_lineno]
    over = [f"{path}: {count} lines, at most {FILE_LINES}" for path, count in lines.items() if count > FILE_LINES]
    for length, path, function in sized:
        place, count = f"{path}:{function.lineno}: {function.name} has", arguments(function)
        if length > FUNCTION_LINES:
            over.append(f"{place} {length} lines, at most {FUNCTION_LINES}")
        if count > ARGUMENTS and "cli" not in path.parts:
            over.append(f"{place} {count} arguments, at most {ARGUMENTS}")
    by_root = {root: sum(n for path, n in lines.items() if path.parts[0] == root) for root in ROOTS}
    print(f"{len(lines)} files, {len(sized)} functions; lines: " + ", ".join(f"{r} {n:,}" for r, n in by_root.items()))
    print("longest files: " + ", ".join(f"{path} {lines[path]}" for path in sorted(lines, key=lambda p: -lines[p])[:4]))
    longest = sorted(sized, key=lambda item: -item[0])[:4]
    print("longest functions: " + ", ".join(f"{path}:{f.name} {length}" for length, path, f in longest))
    print("\n".join(over) or "all within the limits")
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
