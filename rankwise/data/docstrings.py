"""The quickstart's data, made from what is on the machine: Python functions and the first sentence of their docstring.

Sources are the standard library and installed packages under permissive licences.  A standard module, and a package,
is wholly in the training rows or wholly in the validation rows.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from rankwise.data.licences import Library, permissive_packages
from rankwise.errors import DataError

PROMPT = "Summarise this Python function in one sentence.\n\n```python\n{code}\n```"

Function = ast.FunctionDef | ast.AsyncFunctionDef

_LINES = range(3, 41)
_SENTENCE = range(20, 161)
_MOST_BYTES = 300_000  # of a module; larger ones are tables
_MOST_OF_ONE_LIBRARY = 40  # functions, so that no library is the whole lesson
_SKIPPED = re.compile(
    r"(^|/)(_?tests?|testing|conftest|idlelib|lib2to3|turtledemo|ensurepip|_?vendor(ed)?|site-packages|dist-packages"
    r"|examples?|benchmarks?|rankwise|__pycache__)(/|\.py|$)|(^|/)test_"
)
_ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "vs.", "cf.", "resp.")
_NOISE = re.compile(r":\w+:|>>>|\.\. |https?:|\bTODO\b|\bdeprecated\b|@\w|[{}\\|]|\.\.\.|::|\w\(\)\s*->", re.IGNORECASE)


@dataclass(frozen=True)
class Example:
    """A function without its docstring, the sentence that says what it does, and where it stands."""

    code: str
    sentence: str
    origin: str
    licence: str

    def row(self) -> dict[str, str]:
        return {
            "prompt": PROMPT.format(code=self.code),
            "completion": self.sentence,
            "origin": self.origin,
            "license": self.licence,
        }


def write_docstrings(
    folder: Path,
    *,
    train: int = 2000,
    valid: int = 300,
    seed: int = 0,
    stdlib: Path | None = None,
    site: Sequence[str] | None = None,
) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `valid.jsonl` into a folder, at most so many rows, and returns their paths.

    The same machine and seed give the same bytes.  `stdlib` and `site` stand in for where Python and its packages are.

    Raises:
        DataError: there is not one function for each of the two, or not one is asked for.
    """
    if train < 1 or valid < 1:
        raise DataError(f"train = {train}, valid = {valid}: expected at least one row in each")
    libraries = [*_standard_library(stdlib or Path(sysconfig.get_paths()["stdlib"])), *permissive_packages(site)]
    rows: dict[str, list[Example]] = {"train": [], "valid": []}
    wanted = {"train": train, "valid": valid}
    seen: set[str] = set()
    for library in sorted(libraries, key=lambda library: _shuffled(seed, library.name)):
        # The next library goes where relatively more is missing.
        side = min(rows, key=lambda name: len(rows[name]) / wanted[name])
        if len(rows[side]) >= wanted[side]:
            break
        most = min(_MOST_OF_ONE_LIBRARY, wanted[side] - len(rows[side]))
        rows[side] += islice(_examples(library, seed, seen), most)
    if not all(rows.values()):
        raise DataError(
            "no function with a one-sentence docstring was found in Python's library and the installed packages",
            hint="this Python was installed without its sources; name your own data",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return _written(folder / "train.jsonl", rows["train"]), _written(folder / "valid.jsonl", rows["valid"])


def _written(path: Path, examples: list[Example]) -> Path:
    lines = [json.dumps(example.row(), ensure_ascii=False) + "\n" for example in examples]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _standard_library(root: Path) -> Iterator[Library]:
    """Each top-level module or package of the standard library."""
    for top in sorted(root.iterdir()) if root.is_dir() else ():
        if top.suffix == ".py" or (top / "__init__.py").is_file():
            files = [PurePosixPath(path.relative_to(root).as_posix()) for path in sorted(top.rglob("*.py")) or [top]]
            yield Library(f"python/{top.stem}", "PSF-2.0", root, files.copy)


def _examples(library: Library, seed: int, seen: set[str]) -> Iterator[Example]:
    """Functions of a library that are worth learning from; `seen` holds codes and sentences met anywhere before."""
    for file in sorted(library.list_files(), key=lambda file: _shuffled(seed, str(file))):
        for example in _examples_in(library, file):
            if example.code not in seen and example.sentence.lower() not in seen:
                seen |= {example.code, example.sentence.lower()}
                yield example


def _examples_in(library: Library, file: PurePosixPath) -> Iterator[Example]:
    path = library.root / file
    if _SKIPPED.search(str(file)) or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' not in source:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return  # not every file in a package is a module of this Python
    lines = source.split("\n")  # not splitlines: to Python a form feed ends no line
    for node in _functions(tree.body):
        sentence = first_sentence(ast.get_docstring(node) or "")
        code = _without_docstring(node, lines) if sentence else None
        if sentence and code:
            yield Example(code, sentence, f"{file}:{node.lineno}", library.licence)


def _functions(body: Sequence[ast.stmt]) -> Iterator[Function]:
    """Functions of a module and methods of its classes, not those inside other functions."""
    for node in body:
        if isinstance(node, Function):
            yield node
        elif isinstance(node, ast.ClassDef | ast.If | ast.Try):
            yield from _functions(node.body)


def first_sentence(docstring: str) -> str | None:
    """The first sentence on one line, or None where there is none that a person would say."""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split()).replace("``", "`")
    ends = [match.end() for match in re.finditer(r"\.(?=\s|$)", paragraph)]
    end = next((end for end in ends if not paragraph[:end].lower().endswith(_ABBREVIATIONS)), 0)
    sentence = paragraph[:end]
    sound = len(sentence) in _SENTENCE and sentence[0].isupper() and sentence.isascii() and " " in sentence
    return sentence if sound and not _NOISE.search(sentence) else None


def _without_docstring(node: Function, lines: list[str]) -> str | None:
    """The function's own lines, dedented; None where the docstring shares a line or what is left is short or long."""
    docstring = node.body[0]
    begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    if len(node.body) < 2 or docstring.lineno == node.lineno or docstring.end_lineno is None:
        return None
    if node.body[1].lineno <= docstring.end_lineno or node.end_lineno is None:
        return None
    kept = lines[begin - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    code = textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))
    body = node.end_lineno - docstring.end_lineno
    return code if body in _LINES and code.isascii() else None


def _shuffled(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
