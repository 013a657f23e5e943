"""The optimiser that an earlier run left behind, for a run that goes on with its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from rankwise.engine.folder import CHECKPOINTS
from rankwise.engine.state import newest_checkpoint
from rankwise.errors import RunFolderError, listing

_PREFIX = "optimiser."
_WAY = "leave out keep_optimiser (--keep-optimiser): the optimiser then begins anew"


def read_moments(folder: Path, parameters: Mapping[str, nn.Parameter]) -> dict[tuple[str, str], Tensor]:
    """AdamW's moments and step counts by `(parameter, part)`, out of the newest checkpoint of a run.

    Raises:
        RunFolderError: it has no whole checkpoint, trained several adapters, or what it trained has other parameters
            than `parameters`; all of these are listed.
    """
    if not any((folder / CHECKPOINTS).glob("step-*")):
        raise RunFolderError(f"{folder}: has no checkpoints, in which an optimiser would be kept", hint=_WAY)
    checkpoint, _ = newest_checkpoint(folder / CHECKPOINTS)
    groups = [tensors for name, tensors in checkpoint.tensors.items() if name.startswith("adapter-")]
    if len(groups) != 1:
        raise RunFolderError(f"{folder}: its checkpoint is of {len(groups)} adapters, not of one", hint=_WAY)
    found = {}
    for key, tensor in groups[0].items():
        kind, _, name = key.partition("/")
        if kind.startswith(_PREFIX):
            found[name, kind.removeprefix(_PREFIX)] = tensor
    names = {name for name, _ in found}
    problems = [f"{name}: nothing is kept for it" for name in parameters if name not in names]
    problems += [f"{name}: is no parameter of this adapter" for name in sorted(names - parameters.keys())]
    problems += [
        f"{name}: {part} is {tuple(tensor.shape)}, the parameter {tuple(parameters[name].shape)}"
        for (name, part), tensor in found.items()
        if name in parameters and tensor.dim() and tensor.shape != parameters[name].shape
    ]
    if problems:
        raise RunFolderError(f"{folder}: its optimiser is not that of this adapter:\n{listing(problems)}", hint=_WAY)
    return found
