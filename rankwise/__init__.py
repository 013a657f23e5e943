"""LoRA in which rank, alpha, learning rate and targets are measured, not guessed.

The public names, each imported when it is first used: `import rankwise` itself loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.adapters.adapter import Adapter
    from rankwise.adapters.combining import Combination, combine
    from rankwise.adapters.recipe import Recipe
    from rankwise.adapters.spec import LoraSpec
    from rankwise.data.classes import Classes, find_classes
    from rankwise.data.corpus import Corpus
    from rankwise.data.picture_files import read_pictures
    from rankwise.data.pictures import Look
    from rankwise.data.prepare import prepare
    from rankwise.data.split import split
    from rankwise.data.template import Template
    from rankwise.data.text_readings import LabelledTexts, PlainTexts, SourceTargets
    from rankwise.engine.begin import Begun, begin
    from rankwise.engine.evaluate import Evaluation, evaluate
    from rankwise.engine.folder import held_folder
    from rankwise.engine.loop import Outcome, train
    from rankwise.engine.run import Loop, Run, Start
    from rankwise.errors import RankwiseError, RankwiseWarning
    from rankwise.frozen.load import Base, load_base
    from rankwise.planning.plan import plan
    from rankwise.search.compression import Compression, compress
    from rankwise.search.tolerance import Tolerance
    from rankwise.surgery.bank import Bank

_HOMES = {
    "Adapter": "adapters.adapter",
    "Bank": "surgery.bank",
    "Base": "frozen.load",
    "Begun": "engine.begin",
    "Classes": "data.classes",
    "Combination": "adapters.combining",
    "Compression": "search.compression",
    "Corpus": "data.corpus",
    "Evaluation": "engine.evaluate",
    "LabelledTexts": "data.text_readings",
    "Look": "data.pictures",
    "LoraSpec": "adapters.spec",
    "Loop": "engine.run",
    "Outcome": "engine.loop",
    "PlainTexts": "data.text_readings",
    "RankwiseError": "errors",
    "RankwiseWarning": "errors",
    "Recipe": "adapters.recipe",
    "Run": "engine.run",
    "SourceTargets": "data.text_readings",
    "Start": "engine.run",
    "Template": "data.template",
    "Tolerance": "search.tolerance",
    "begin": "engine.begin",
    "combine": "adapters.combining",
    "compress": "search.compression",
    "evaluate": "engine.evaluate",
    "find_classes": "data.classes",
    "held_folder": "engine.folder",
    "load_base": "frozen.load",
    "plan": "planning.plan",
    "prepare": "data.prepare",
    "read_pictures": "data.picture_files",
    "split": "data.split",
    "train": "engine.loop",
}

__all__ = [
    "Adapter",
    "Bank",
    "Base",
    "Begun",
    "Classes",
    "Combination",
    "Compression",
    "Corpus",
    "Evaluation",
    "LabelledTexts",
    "Look",
    "Loop",
    "LoraSpec",
    "Outcome",
    "PlainTexts",
    "RankwiseError",
    "RankwiseWarning",
    "Recipe",
    "Run",
    "SourceTargets",
    "Start",
    "Template",
    "Tolerance",
    "begin",
    "combine",
    "compress",
    "evaluate",
    "find_classes",
    "held_folder",
    "load_base",
    "plan",
    "prepare",
    "read_pictures",
    "split",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    return getattr(import_module(f"rankwise.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
