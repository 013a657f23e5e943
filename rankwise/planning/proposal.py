"""The best configuration that fits: what is given up first is what costs least."""

from __future__ import annotations

from typing import Any

from rankwise.errors import SpecError
from rankwise.planning.amounts import read_amount, shown
from rankwise.planning.limits import MICRO_TOKENS
from rankwise.planning.memory import memory_of
from rankwise.planning.request import Machine, PlanRequest
from rankwise.planning.shapes import Shapes

# How far above a prediction the truth may lie.  On a processor more than was measured (docs/planning.md); on a GPU the
# goal, which has not been measured.
_MARGIN = {"cpu": 1.15, "cuda": 1.1}
_LEAST_MICRO, _LEAST_RANK = 512, 4

_CHECKPOINTING = "each block is computed twice: a third more time, the same result"
_STORAGE = {
    "int8": "weights of the blocks in 8 bits: a small error of rounding",
    "nf4": "weights of the blocks in 4 bits (QLoRA): a larger error of rounding",
}


def proposed(shapes: Shapes, request: PlanRequest, machine: Machine, memory: int | str) -> dict[str, Any]:
    """The first of a row of configurations, each giving up more than the one before, that fits with room to spare.

    What the request says stays as it is, but for what is given up on the way.

    Returns:
        `fits`, `memory`, the `settings` that differ from the request, the `peak`, `why` in sentences, and all `tried`.

    Raises:
        SpecError: `memory` is no amount.
    """
    try:
        room = read_amount(memory) if isinstance(memory, str) else int(memory)
    except ValueError as error:
        raise SpecError(str(error)) from None
    tried: list[dict[str, Any]] = []
    for changes, reasons in _concessions(request, machine):
        peak = memory_of(shapes, request.model_copy(update=changes), machine).peak
        tried.append({"settings": changes, "peak": peak})
        if peak * _MARGIN[machine.device] <= room:
            why = reasons or ["what was asked for fits as it is"]
            return {"fits": True, "memory": room, "settings": changes, "peak": peak, "why": why, "tried": tried}
    least = min(tried, key=lambda one: one["peak"])
    why = [f"the least that was found takes {shown(least['peak'])}; it would take a smaller model, or more memory"]
    return {"fits": False, "memory": room, **least, "why": why, "tried": tried}


def _concessions(request: PlanRequest, machine: Machine) -> list[tuple[dict[str, Any], list[str]]]:
    """Changes to the request with their reasons, from nothing to everything."""
    changes: dict[str, Any] = {}
    reasons: list[str] = []
    found: list[tuple[dict[str, Any], list[str]]] = [({}, [])]

    def give_up(reason: str, **more: Any) -> None:
        changes.update(more)
        reasons.append(reason)
        found.append((dict(changes), list(reasons)))

    micro = min(request.micro_tokens or MICRO_TOKENS[machine.device], request.batch_tokens)
    while micro > max(_LEAST_MICRO, MICRO_TOKENS["cpu"]):
        micro //= 2
        give_up(f"{micro} tokens at once: the same result, products a little slower", micro_tokens=micro)
    if not request.checkpointing:
        give_up(_CHECKPOINTING, checkpointing=True)
    while micro > _LEAST_MICRO:
        micro //= 2
        give_up(f"{micro} tokens at once: the same result, products slower", micro_tokens=micro)
    if request.form == "full":
        give_up("adapters in place of all weights", method="lora")
    if request.held_as == "dense":
        give_up(_STORAGE["int8"], storage="int8")
    if request.held_as != "nf4":
        give_up(_STORAGE["nf4"], storage="nf4")
    rank = request.rank
    while rank > _LEAST_RANK:
        rank //= 2
        give_up(f"rank {rank}: less room to learn in", rank=rank)
    return found
