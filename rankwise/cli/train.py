"""`rankwise train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Json
from rankwise.texts import plain


def _option(help_text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help_text, show_default=False, **settings)


def train(
    model: Annotated[str | None, _option("Base model: a folder, or an id on the hub.", metavar="PATH_OR_ID")] = None,
    data: Annotated[list[str] | None, _option("Documents to learn from; may be repeated.", metavar="FILE")] = None,
    out: Annotated[Path | None, _option("Folder of the run; must be new.", metavar="DIR")] = None,
    task: Annotated[
        str | None,
        _option("causal-lm, masked-lm, seq2seq, sequence-classification or image-classification [causal-lm]."),
    ] = None,
    valid: Annotated[str | None, _option("Documents to judge by [some are held back].", metavar="FILE")] = None,
    test: Annotated[str | None, _option("Documents for the last comparison with the base.", metavar="FILE")] = None,
    config: Annotated[Path | None, _option("Settings in YAML; options go before it.", metavar="RUN.YAML")] = None,
    scenario: Annotated[str | None, _option("Starting point: quick, general, complex or limited.")] = None,
    resume: Annotated[bool | None, _option("Go on from the newest checkpoint in --out.", "--resume")] = None,
    force: Annotated[bool | None, _option("Continue from an adapter of another base all the same.", "--force")] = None,
    continue_from: Annotated[Path | None, _option("Train this adapter further.", metavar="DIR")] = None,
    rank: Annotated[int | None, _option("Rank [16].")] = None,
    alpha: Annotated[float | None, _option("Alpha [2 × rank].")] = None,
    targets: Annotated[
        str | None, _option("minimal, attention, mlp, all-linear, names with commas, or re:PATTERN [all-linear].")
    ] = None,
    scaling: Annotated[str | None, _option("alpha/r, alpha/sqrt(r) or alpha [alpha/r].")] = None,
    dropout: Annotated[float | None, _option("Dropout of the adapter's input [0].")] = None,
    form: Annotated[str | None, _option("lora or dora [lora].")] = None,
    init: Annotated[str | None, _option("kaiming, gaussian, pissa or olora [kaiming].")] = None,
    rank_pattern: Annotated[list[str] | None, _option("Other ranks; may be repeated.", metavar="NAME=RANK")] = None,
    alpha_pattern: Annotated[list[str] | None, _option("Other alphas; may be repeated.", metavar="NAME=ALPHA")] = None,
    modules_to_save: Annotated[str | None, _option("Modules trained whole, with commas.")] = None,
    lr: Annotated[float | None, _option("Peak learning rate [2e-4; 5e-4 for some tasks].")] = None,
    lr_ratio: Annotated[float | None, _option("LoRA+: B learns at so many times --lr [1].")] = None,
    schedule: Annotated[str | None, _option("linear, cosine or constant [linear].")] = None,
    warmup: Annotated[float | None, _option("Share of the steps in which it rises [0.03].")] = None,
    weight_decay: Annotated[float | None, _option("AdamW's weight decay [0].")] = None,
    clip: Annotated[float | None, _option("Largest gradient norm [1].")] = None,
    epochs: Annotated[float | None, _option("Passes over the documents [1; 3 for classes].")] = None,
    max_steps: Annotated[int | None, _option("Steps in place of epochs.")] = None,
    batch_tokens: Annotated[int | None, _option("Tokens of one optimiser step [4096].")] = None,
    batch_documents: Annotated[int | None, _option("Or documents of one step [by task].")] = None,
    micro_tokens: Annotated[int | None, _option("Tokens at once; never changes the result [by device].")] = None,
    max_length: Annotated[int | None, _option("Longest document, in tokens [2048; 512 for encoders].")] = None,
    overlong: Annotated[str | None, _option("Longer ones: truncate or drop [truncate].")] = None,
    train_on: Annotated[str | None, _option("all or last assistant turns [all].")] = None,
    seed: Annotated[int | None, _option("Seed of start, order and dropout [0].")] = None,
    patience: Annotated[int | None, _option("Stop after so many evaluations without a new best [never].")] = None,
    evaluate_every: Annotated[int | None, _option("Steps between evaluations [ten a run].")] = None,
    save_every: Annotated[int | None, _option("Steps between checkpoints [at evaluations].")] = None,
    checkpointing: Annotated[bool | None, _option("Less memory, a third more time.", "--checkpointing")] = None,
    dtype: Annotated[str | None, _option("auto, bfloat16, float16 or float32 [auto].")] = None,
    device: Annotated[str | None, _option("auto, cpu, cuda, … [auto].")] = None,
    track: Annotated[list[str] | None, _option("tensorboard, wandb, mlflow, …; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """Train an adapter.

    Ends with a comparison against the base on unseen documents, and a report.

    Examples:
      rankwise train --model ./SmolLM2-135M-Instruct --data chats.jsonl --out runs/chats
      rankwise train --task sequence-classification --model ./bert --data sst2.jsonl --out runs/sst2
      rankwise train --config run.yaml --rank 8 --out runs/rank-8
      rankwise train --config run.yaml --out runs/chats --resume
    """
    given = {name: value for name, value in locals().items() if value is not None and value != []}
    _run(config, {name: value for name, value in given.items() if name not in ("config", "json")}, quiet=json)


def _run(config: Path | None, given: dict[str, Any], *, quiet: bool) -> None:
    from rankwise.jobs.request import TrainRequest, read_config
    from rankwise.jobs.train import run_training

    settings = {**(read_config(config) if config is not None else {}), **given}
    missing = [f"'--{name}'" for name in ("model", "data", "out") if name not in settings]
    if missing:
        raise typer.BadParameter(f"Missing option {', '.join(missing)}.")
    request = TrainRequest(**settings)
    with looking_on(quiet) as watch:
        summary = run_training(request, watch)
        if quiet:
            print_json(summary)
        else:
            show(summary, watch)


def show(summary: dict[str, Any], watch: Any) -> None:
    """The result for people: the verdict, what it took, where things are."""
    training = summary["training"]
    watch.say(f"\n[bold]{plain(summary['verdict'])}[/bold]")
    watch.say(
        f"{training['steps']} steps, {training['tokens']:,} tokens at {training['tokens_per_second']:,.0f} tokens/s, "
        f"{training['peak_memory_bytes'] / 1e9:.2f} GB at most{_expected(training)}; report: {plain(summary['report'])}"
    )


def _expected(training: dict[str, Any]) -> str:
    predicted = training.get("predicted_memory_bytes")
    return f" ({predicted / 1e9:.2f} GB were expected)" if predicted else ""
