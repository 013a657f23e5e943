"""The options of `rankwise train`: one for each setting of `jobs/request.py`, with its default in brackets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer


class Setting(NamedTuple):
    """`kind` None is a switch; `metavar` as in the help."""

    name: str
    kind: Any
    help: str
    metavar: str | None = None


# fmt: off
SETTINGS: tuple[Setting, ...] = (
    # the run
    Setting("model", str, "Base model: a folder, or an id on the hub [required].", "PATH_OR_ID"),
    Setting("data", list[str], "Documents to learn from; may be repeated [required].", "FILE"),
    Setting("out", Path, "Folder of the run; must be new [required].", "DIR"),
    Setting("task", str, "causal-lm, masked-lm, seq2seq, sequence-classification or image-classification [causal-lm]."),
    Setting("valid", str, "Documents to judge by [some are held back].", "FILE"),
    Setting("hold_back", float, "Share of the documents that is held back without --valid [0.05, at most 500]."),
    Setting("test", str, "Documents for the last comparison with the base.", "FILE"),
    Setting("config", Path, "Settings in YAML; options go before it.", "RUN.YAML"),
    Setting("resume", None, "Go on from the newest checkpoint in --out."),
    Setting("continue_from", Path, "Train this adapter further.", "DIR"),
    Setting("keep_optimiser", None, "Go on with its optimiser too, not with a fresh one."),
    Setting("onto", Path, "Train a new adapter on top of this one; --out holds both as one.", "DIR"),
    Setting("replay", str, "Old documents to mix in, and their share, such as old.jsonl:0.2.", "FILE:SHARE"),
    Setting("force", None, "Continue from an adapter of another base all the same."),
    Setting("seed", int, "Seed of start, order and dropout [0]."),
    Setting("track", list[str], "tensorboard, wandb, mlflow, …; may be repeated."),
    # the adapter
    Setting("scenario", str, "Starting point: quick, general, complex or limited."),
    Setting("rank", int, "Rank [16]; of form adalora before pruning."),
    Setting("alpha", float, "Alpha [2 × rank]."),
    Setting("targets", str, "minimal, attention, mlp, all-linear, names with commas, or re:PATTERN [all-linear]."),
    Setting("exclude", str, "Layers left out of these; said alike [none]."),
    Setting("layers", str, "Blocks by number, such as 0-11,20 or 16- [all]."),
    Setting("form", str, "lora, dora, adalora, or full: all weights [lora]."),
    Setting("scaling", str, "alpha/r, alpha/sqrt(r) or alpha [alpha/r]."),
    Setting("dropout", float, "Dropout of the adapter's input [0]."),
    Setting("init", str, "kaiming, gaussian, pissa, olora, loftq, eva or lora_ga [kaiming]."),
    Setting("init_documents", int, "Documents that eva and lora_ga look at [128]."),
    Setting("init_rho", float, "eva: most rank of a layer, in times --rank [2]."),
    Setting("rank_pattern", list[str], "Other ranks; may be repeated.", "NAME=RANK"),
    Setting("alpha_pattern", list[str], "Other alphas; may be repeated.", "NAME=ALPHA"),
    Setting("target_rank", int, "Of form adalora: mean rank at the end [two thirds of --rank]."),
    Setting("orthogonality", float, "Of form adalora: weight of the term that keeps directions apart [0.1]."),
    Setting("modules_to_save", str, "Modules trained whole, with commas."),
    Setting("add_tokens", str, "New tokens with rows of their own, with commas."),
    Setting("nested", None, "Train every smaller rank along; which is used is said later, with --rank."),
    # learning
    Setting("lr", float, "Peak learning rate [2e-4; 5e-4 for some tasks; of form full a tenth]."),
    Setting("lr_ratio", float, "LoRA+: B, and the magnitudes of form dora, learn at so many times --lr [1]."),
    Setting("schedule", str, "linear, cosine or constant [linear]."),
    Setting("warmup", float, "Share of the steps in which it rises [0.03]."),
    Setting("weight_decay", float, "AdamW's weight decay [0]."),
    Setting("clip", float, "Largest gradient norm [1]."),
    Setting("epochs", float, "Passes over the documents [1; 3 for classes]."),
    Setting("max_steps", int, "Steps in place of epochs."),
    Setting("batch_tokens", int, "Tokens of one optimiser step [4096]."),
    Setting("batch_documents", int, "Or documents of one step [by task]."),
    Setting("patience", int, "Stop after so many evaluations without a new best [never]."),
    Setting("evaluate_every", int, "Steps between evaluations [ten a run]."),
    Setting("save_every", int, "Steps between checkpoints [at evaluations]."),
    # documents
    Setting("max_length", int, "Longest document, in tokens [2048; 512 for encoders and seq2seq]."),
    Setting("overlong", str, "Longer ones: truncate or drop [truncate]."),
    Setting("train_on", str, "all or last assistant turns [all]."),
    # the machine
    Setting("device", str, "auto, cpu, cuda, … [auto]."),
    Setting("dtype", str, "auto, bfloat16, float16 or float32 [auto]."),
    Setting("storage", str, "How the base is held: dense, int8, or nf4 as in QLoRA [dense]."),
    Setting("micro_tokens", int, "Tokens at once; never changes the result [by device]."),
    Setting("checkpointing", None, "Less memory, a third more time."),
)
# fmt: on


def parameters() -> Iterator[inspect.Parameter]:
    """As typer reads them off a function."""
    for setting in SETTINGS:
        names = [f"--{setting.name.replace('_', '-')}"] if setting.kind is None else []
        told = typer.Option(*names, help=setting.help, metavar=setting.metavar, show_default=False)
        kind: Any = (setting.kind or bool) | None
        annotation = Annotated[kind, told]
        yield inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
