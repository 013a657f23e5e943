"""What a training run is asked for: `Run` is one adapter's own, `Loop` is shared by all that train together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rankwise.data.replay import Replay
from rankwise.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]


class Pruning(Settings):
    """How form `adalora` comes down to its ranks (arXiv:2303.10512, algorithm 1).

    The budget of directions, over all sites together, falls from what the adapter begins with along a cubic (equation
    12) and goes to those whose importance is largest: |weight × gradient|, smoothed, times its smoothed uncertainty
    (equations 7 to 11).  A direction that is left out keeps its last importance, and comes back if others fall below
    it; at the end of the falling the allocation is final, and what is left out is removed.

    Args:
        target_rank: mean rank of a site at the end; None for two thirds of that at the start.
        begin: share of the steps before the budget falls.
        settle: share of the steps after it has fallen, at the final ranks.
        every: steps between allocations.
        orthogonality: weight of ‖BᵀB - 1‖² + ‖AAᵀ - 1‖², summed over the sites (equation 4); it is no part of any loss
            that is told, and its gradient is added after clipping.
        memory: of the two smoothings, a step.
    """

    target_rank: int | None = Field(default=None, ge=1)
    begin: float = Field(default=0.1, ge=0, lt=1)
    settle: float = Field(default=0.3, ge=0, lt=1)
    every: int = Field(default=10, ge=1)
    orthogonality: float = Field(default=0.1, ge=0)
    memory: Beta = 0.85

    @model_validator(mode="after")
    def _leaves_time(self) -> Pruning:
        if self.begin + self.settle >= 1:
            raise ValueError(
                f"begin {self.begin:g} and settle {self.settle:g} leave no steps in which the budget falls"
            )
        return self


class Run(Settings):
    """How one adapter learns: AdamW (arXiv:1711.05101) under a schedule, gradients clipped by their norm.

    Args:
        lr: peak learning rate, per optimiser step.
        lr_ratio: LoRA+ (arXiv:2402.12354): B, and the magnitudes of form `dora`, learn at so many times `lr`; the
            decay of B is relative to `lr` all the same.  1 is plain AdamW.
        schedule: how it falls after the warm-up: straight to 0, along a cosine to 0, or not at all.
        warmup: share of the steps over which it rises from 0.
        weight_decay: decoupled, per step and relative to the learning rate.
        betas, eps: AdamW's.
        clip: largest norm of the adapter's gradient; longer ones are shortened to it.
        pruning: of form `adalora` alone.
        nested: of form `lora`, every prefix of the ranks learns to be an adapter by itself (`engine/nested.py`).
        moments: folder of the run that trained the adapter so far, whose optimiser it goes on with; None begins anew.
    """

    lr: float = Field(default=2e-4, gt=0)
    lr_ratio: float = Field(default=1.0, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0)
    pruning: Pruning = Field(default_factory=Pruning)
    nested: bool = False
    moments: Path | None = None

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step (from 0) of so many."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (1 - done) if self.schedule == "linear" else self.lr


class Start(Settings):
    """How a start that is found in documents (init `eva`, `lora_ga`) looks at them.

    Args:
        documents: how many, the first that training will meet; `eva` looks at fewer where it is sure sooner.
        rho: `eva` may give a layer so many times its rank, under the same total; 1 leaves every rank as it is.
        micro_tokens, checkpointing: as in `Loop`.
    """

    documents: int = Field(default=128, ge=1)  # LoRA-GA's authors take 64 batches of 2
    rho: float = Field(default=2.0, ge=1)  # EVA's authors
    micro_tokens: int = Field(default=0, ge=0)
    checkpointing: bool = False


class Loop(Settings):
    """How the documents go by.

    Args:
        epochs: passes over the documents; a part of one is allowed.
        max_steps: or, so many optimiser steps, over as many epochs as they take; 0 counts by epochs.
        batch_tokens: tokens of one optimiser step; documents are not cut to fit.
        batch_documents: or, documents of one optimiser step, whatever their length.
        micro_tokens: tokens that go through the model at once; a step is cut into as many such pieces as it takes,
            with the same result; 0 chooses by device.
        seed: of the order of documents; an adapter's start and dropout have the seed that it was added with.
        evaluate_every: steps between evaluations on the validation documents; 0 chooses about ten a run.
        save_every: steps between checkpoints; 0 saves at every evaluation.
        save_apart: seconds that must lie between two checkpoints, or none is written, not even at the end; for runs
            that may begin again. One that is told to stop always leaves a checkpoint.
        patience: stop after so many evaluations without a new best; 0 never stops early.
        keep: how many checkpoints stay on disk.
        checkpointing: keep only each block's input and compute the rest again: less memory, a third more time.
        replay: the last documents are old ones, mixed in epoch by epoch; None has only new ones.
    """

    epochs: float = Field(default=1, gt=0)
    max_steps: int = Field(default=0, ge=0)
    batch_tokens: int = Field(default=4096, ge=1)
    batch_documents: int | None = Field(default=None, ge=1)
    micro_tokens: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    evaluate_every: int = Field(default=0, ge=0)
    save_every: int = Field(default=0, ge=0)
    save_apart: float = Field(default=0, ge=0)
    patience: int = Field(default=0, ge=0)
    keep: int = Field(default=2, ge=1)
    checkpointing: bool = False
    replay: Replay | None = None
