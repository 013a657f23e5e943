"""A base model and what stands before it, from a folder or the Hugging Face hub, in a format the machine is good at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.utils import logging

from rankwise.errors import ModelError, SpecError, listing, nearest
from rankwise.frozen.heads import class_names, head_parameters, may_be_fresh, set_classes, set_padding, whole_modules
from rankwise.frozen.precision import Precision, choose_precision
from rankwise.frozen.storing import StorageConfig, misfits
from rankwise.kernels.sizes import Storage
from rankwise.tasks import DEFAULT, TASKS, task_of

_Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # in the file, in the model


@dataclass(frozen=True)
class Base:
    """What was loaded and how it is held.

    Attributes:
        tokenizer: or, where pictures are read, the image processor.
        stored: the number format of the weights on disk, as the model's config says; float32 where it does not.
        storage: how the weights of its linear layers are held: as they are, or in codes (frozen/coded.py).
        task: what it was loaded for.
        classes: their names, by number; () for a task without.
        fresh: modules that the checkpoint does not have, or has for other classes: they have to be trained whole.
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    precision: Precision
    stored: torch.dtype
    storage: Storage = "dense"
    task: str = DEFAULT
    classes: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


def load_base(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    storage: Storage = "dense",
    remainder_rank: int = 0,
    task: str = DEFAULT,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> Base:
    """A model for a task in evaluation mode, and its tokenizer or image processor.

    Args:
        name: a folder with config.json, or a model's id on the hub.  Code in a repository is never run, pickled weights
            are never opened.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        device: `auto` (a GPU when there is one), or as torch names them.
        storage: `dense`, or `int8` or `nf4` for the linear layers, which are put in codes one by one as they are read.
        remainder_rank: keep so much of what that takes away, for `init="loftq"`.
        task: one of `rankwise.tasks.TASKS`.
        classes: names of what is to be told apart, in order; by default those of the checkpoint.  A checkpoint without
            a head for them gets a fresh one.
        seed: of a fresh head.

    Raises:
        ModelError: it cannot be found or read, lacks weights, or is no model for the task; says the way out.
        SpecError: no such task, no such number format, or no such device here.
    """
    if task not in TASKS:
        raise SpecError(f"no task {task!r}{nearest(task, list(TASKS))}", hint=f"one of {', '.join(TASKS)}")
    source = _source(name)
    place = _place(device)
    precision = choose_precision(place, dtype)
    logging.disable_progress_bar()
    config = _read(source, "config", AutoConfig)
    _check_made_for(source, config, task)
    stored = getattr(config, "dtype", None) or torch.float32
    reader = _read_reader(source, config, task)
    codes = None if storage == "dense" else StorageConfig(storage, remainder_rank)
    loading = _Loading(source, config, precision.dtype, task, codes)
    names: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    if not TASKS[task].classifies:
        model = _read_weights(loading)
    else:
        known = set_classes(config, classes or class_names(config))
        if task == "sequence-classification":
            set_padding(config, reader)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, fresh = _read_classifier(loading, known=known)
        names = tuple(class_names(config))
    return Base(source, model.to(place).eval(), reader, place, precision, stored, storage, task, names, fresh)


def read_tokenizer(folder: Path) -> Any:
    """A tokenizer by itself, from a folder.  Code that comes with it is never run.

    Raises:
        ModelError: it cannot be read; says why.
    """
    return _read(str(folder), "tokenizer", _class("AutoTokenizer"))


def read_config(name: str | Path) -> Any:
    """A model's config, by transformers' own class for it.  Code in a repository is never run.

    Raises:
        ModelError: it cannot be found or read, or needs code of its own; says the way out.
    """
    return _read(_source(name), "config", AutoConfig)


def read_outline(name: str | Path, task: str | None = None) -> Any:
    """The model that a config describes, on the meta device: without memory for its weights.

    Args:
        name: as for `load_base`.
        task: by default the one that the checkpoint was made for, else a causal language model, else a bare model.

    Raises:
        ModelError: as `read_config`, or no such model can be built from it.
    """
    source, config = _source(name), read_config(name)
    made_for = task_of(next(iter(config.architectures or ()), ""), paired=config.is_encoder_decoder)
    loads = _class(TASKS[task or made_for or DEFAULT].loads)
    try:
        with torch.device("meta"):
            if task is None and made_for is None and type(config) not in loads._model_mapping:
                loads = _class("AutoModel")
            return loads.from_config(config, trust_remote_code=False)
    except Exception as error:  # numbers that make no sense raise whatever the model's own code trips over
        reason = _first_line(error)
        raise ModelError(f"{source}: its config makes no model: {reason}", hint=_way_out(source)) from error


def _class(name: str) -> Any:
    return getattr(transformers, name)


def _check_made_for(source: str, config: Any, task: str) -> None:
    """That transformers has a class for the task in this model's family.

    Raises:
        ModelError: it has none; says what the checkpoint was made for.
    """
    if type(config) in _class(TASKS[task].loads)._model_mapping:
        return
    made_as = next(iter(config.architectures or ()), "")
    own = task_of(made_as, paired=config.is_encoder_decoder)
    said = f"{source}: there is no model for {task} in the family {config.model_type!r}"
    other = own is not None and own != task
    raise ModelError(
        f"{said}; the checkpoint is a {made_as}" if made_as else said,
        hint=f"--task {own} is what it was made for" if other else "take a model that was made for the task",
    )


def _read_reader(source: str, config: Any, task: str) -> Any:
    """A tokenizer, or an image processor; a model of pictures that comes without one gets the plainest."""
    if TASKS[task].reads == "AutoTokenizer":
        return _read(source, "tokenizer", _class("AutoTokenizer"))
    folder, size = Path(source), getattr(config, "image_size", None)
    alone = folder.is_dir() and not any(
        (folder / f"{part}_config.json").exists() for part in ("preprocessor", "processor")
    )
    if alone and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        even = (0.5,) * getattr(config, "num_channels", 3)
        shape = {"height": height, "width": width}
        return _class("ViTImageProcessorPil")(size=shape, image_mean=even, image_std=even)
    return _read(source, "image processor", _class("AutoImageProcessor"), backend="pil")


@dataclass(frozen=True)
class _Loading:
    """What is read, and how; `codes` None holds weights as they are."""

    source: str
    config: Any
    dtype: torch.dtype
    task: str
    codes: StorageConfig | None

    def model(self) -> tuple[Any, list[str], dict[str, _Shapes]]:
        """The model, the parameters that are missing, and those whose shape is another in the file."""
        wanted = {"config": self.config, "dtype": self.dtype, "quantization_config": self.codes}
        told = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = _read(self.source, "weights", _class(TASKS[self.task].loads), **wanted, **told)
        mismatched = [*found["mismatched_keys"], *misfits(model)]
        return model, sorted(found["missing_keys"]), {name: (tuple(a), tuple(b)) for name, a, b in mismatched}

    def check_whole(self, missing: Sequence[str], mismatched: dict[str, _Shapes]) -> None:
        """That nothing is missing or of another shape.

        Raises:
            ModelError: something is.
        """
        problems = [f"{name}: missing" for name in missing]
        problems += [f"{name}: {a} in the file, {b} in the model" for name, (a, b) in mismatched.items()]
        if problems:
            raise ModelError(
                f"{self.source}: its weights do not fit its config:\n{listing(problems)}", hint=_way_out(self.source)
            )


def _read_weights(loading: _Loading) -> Any:
    """The model; where a weight is missing or has another shape, transformers would go on with random numbers."""
    model, missing, mismatched = loading.model()
    loading.check_whole(missing, mismatched)
    return model


def _read_classifier(loading: _Loading, *, known: bool) -> tuple[Any, tuple[str, ...]]:
    """The model, and its fresh modules: what stands behind the base may be missing, or be made for other classes."""
    talk = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is told here, and how it is made good
    try:
        model, missing, mismatched = loading.model()
    finally:
        logging.set_verbosity(talk)
    fresh = [name for name in (*missing, *mismatched) if may_be_fresh(model, name)]
    rest = [name for name in missing if name not in fresh]
    loading.check_whole(rest, {name: shapes for name, shapes in mismatched.items() if name not in fresh})
    return model, whole_modules(model, fresh if known else [*fresh, *head_parameters(model)])


def _source(name: str | Path) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        # Absolute: "models/llama" could be a repository's name, and a record must not be taken for one.
        return str(path.resolve())
    if path.is_absolute() or str(name).startswith((".", "~")):
        raise ModelError(f"{name}: no such folder", hint="give the folder that holds config.json")
    return str(name)


def _place(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise SpecError(f"no device {device!r} here: {_first_line(error)}", hint="auto, cpu, cuda or cuda:1") from None
    return place


def _read(source: str, part: str, reader: Any, **wanted: Any) -> Any:
    try:
        return reader.from_pretrained(source, trust_remote_code=False, **wanted)
    except Exception as error:  # on a stranger's files the readers beneath raise anything, a bare Exception too
        if "trust_remote_code" in str(error):
            reason, hint = "it needs code of its own, which is never run", "take a model that transformers itself knows"
        else:
            reason, hint = _first_line(error), _way_out(source)
        raise ModelError(f"{source}: the {part} cannot be loaded: {reason}", hint=hint) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def _way_out(source: str) -> str:
    if Path(source).is_dir():
        return "a model's folder holds config.json, the weights as .safetensors, and the tokenizer's files"
    return "give a folder that holds the model, or check the id and the connection to the hub"
