"""The memory of a configuration, part by part, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from rankwise.adapters.selection import Place, choose
from rankwise.adapters.spec import LoraSpec
from rankwise.errors import TargetError
from rankwise.planning.block import Block, blocks_of
from rankwise.planning.held import held_of, held_whole, sites_of
from rankwise.planning.limits import CHUNK_BYTES, LEAST_CHUNK, MICRO_TOKENS
from rankwise.planning.passes import Manner, Pass
from rankwise.planning.process import ASSUMED
from rankwise.planning.request import Machine, PlanRequest
from rankwise.planning.shapes import Shapes, Tensor
from rankwise.planning.tape import Tape, most_alive

_CHOOSING = ("rank", "targets", "exclude", "layers", "rank_pattern")  # what of a request says which layers


@dataclass(frozen=True)
class Memory:
    """Bytes of one configuration; the parts add up to `peak`, unless loading takes more.

    Attributes:
        weights: the frozen base (in full fine-tuning: the copy that is multiplied).
        adapters: float32 masters of what is trained.
        gradients, optimiser: of what is trained, float32.
        activations: what autograd keeps at the end of the forward pass.
        working: the largest passing need on top: the chunk of logits, or gradients of the widest block.
        process: Python, torch and what they loaded; 0 on a GPU.
        loss_chunk: the logits that exist at once (part of `working`, or less than it).
        loading: the peak while weights are read.
        best: a copy of what is trained, where validation was best.
    """

    weights: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    working: int
    process: int
    loss_chunk: int
    loading: int
    best: int = 0

    @property
    def step(self) -> int:
        held = self.weights + self.adapters + self.gradients + self.optimiser + self.best
        return held + self.activations + self.working + self.process

    def validated(self, whole: int) -> Memory:
        """With so many parameters more, trained whole, and with the copy of the best that validation keeps."""
        held = held_whole(whole)
        return replace(
            self,
            adapters=self.adapters + held.adapters,
            gradients=self.gradients + held.gradients,
            optimiser=self.optimiser + held.optimiser,
            best=self.gradients + held.gradients,
        )

    @property
    def peak(self) -> int:
        return max(self.step, self.loading)

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "peak": self.peak}


def ranks_of(shapes: Shapes, request: PlanRequest) -> dict[str, int]:
    """Path → rank of the layers that the request means; as surgery/sites.py chooses them.

    Raises:
        TargetError: a name, a pattern or a block number matches nothing.
    """
    spec = LoraSpec(**{name: getattr(request, name) for name in _CHOOSING})
    places = {tensor.layer: Place((tensor.layer,), tensor.role) for tensor in shapes.tensors if tensor.role is not None}
    # A tied head has no tensor of its own to count; it may be named all the same where layers are left out.
    shared = {path: Place((path,), "head") for path in shapes.shared if path not in places}
    chosen = choose(spec, places | shared, [tensor.layer for tensor in shapes.tensors])
    if uncounted := [path for path in chosen if path in shared]:
        raise TargetError(f"{', '.join(uncounted)}: shares the embedding's weight, and is not counted here")
    return {path: spec.rank_at(path) for path in chosen}


def memory_of(shapes: Shapes, request: PlanRequest, machine: Machine, process: int | None = None) -> Memory:
    """Bytes of one configuration.

    Args:
        process: what was measured in this process; None takes the assumption.

    Raises:
        TargetError: the targets match nothing.
    """
    ranks = {} if request.form == "full" else ranks_of(shapes, request)
    held = held_of(shapes, ranks, request.form, request.held_as, machine.width)
    manner, blocks = _manner(shapes, request, machine), blocks_of(shapes, ranks)
    kept, most = _played(blocks, manner)
    own = process if process is not None else ASSUMED
    own = own if machine.device == "cpu" else 0
    stays = 0 if request.form == "full" else _factor_bytes(shapes, ranks)  # gradients and moments are on the tape
    return Memory(
        weights=held.weights,
        adapters=held.adapters,
        gradients=held.gradients,
        optimiser=held.optimiser,
        activations=kept,
        working=max(0, most - kept - 3 * stays),
        process=own,
        loss_chunk=min(manner.chunk, manner.supervised) * manner.classes * machine.width,
        loading=_loading(shapes, held.weights, machine, own),
    )


def _factor_bytes(shapes: Shapes, ranks: Mapping[str, int]) -> int:
    linear = [site for site in sites_of(shapes, ranks) if site.kind in ("linear", "conv1d") and _in_block(site)]
    return sum(4 * ranks[site.layer] * (site.inputs + site.outputs) for site in linear)


def _in_block(site: Tensor) -> bool:
    return any(part.isdigit() for part in site.name.split("."))


def _manner(shapes: Shapes, request: PlanRequest, machine: Machine) -> Manner:
    micro = request.micro_tokens or MICRO_TOKENS[machine.device]
    tokens = max(min(micro, request.batch_tokens), 1)
    classes = shapes.sizes["vocab"] or 1
    width = 4 if request.form == "full" else machine.width  # a head that is trained gives float32 logits
    return Manner(
        tokens=tokens,
        documents=max(1, round(tokens / request.document_tokens)),
        width=machine.width,
        compiled=machine.compiled,
        form=request.form,
        supervised=max(1, round(tokens * request.supervised)),
        chunk=max(LEAST_CHUNK, CHUNK_BYTES[machine.device] // (classes * width)),
        classes=classes,
        dropout=request.dropout > 0,
        quantised=request.held_as != "dense",
        checkpointing=request.checkpointing,
        layer_norm=shapes.family.norm == "layer",
    )


def _played(blocks: list[Block], manner: Manner) -> tuple[int, int]:
    """Kept at the end of the forward pass, and most alive, in a micro-batch after the first step."""
    tape = Tape()
    for block in blocks:
        for linear in (*block.into, *block.out, *block.up, *block.down):
            for side in (linear.inputs, linear.outputs) if linear.rank else ():
                for _ in range(3):  # the gradient, and the optimiser's two moments
                    tape.new(4 * linear.rank * side)
    played = Pass(tape, blocks, manner)
    played.run()
    return played.kept, most_alive(tape.events)


def _loading(shapes: Shapes, weights: int, machine: Machine, process: int) -> int:
    """Weights that are held in another format than on disk lie in memory twice while they are converted."""
    converted = shapes.stored_bytes and shapes.stored_bytes != weights
    return process + weights + (shapes.stored_bytes if converted and machine.device == "cpu" else 0)
