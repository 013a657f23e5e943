"""What one micro-batch allocates and gives back, forward and backward, in the order in which the engine does.

Counted from engine/forward.py, engine/head.py, kernels/*.py and adapters/product.py: every tensor that autograd keeps,
every one that is there for a moment.  With the compiled kernels norms, gates and rotary embeddings are one operation
each; without them they are written out by transformers, with tensors in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rankwise.kernels.sizes import LANES
from rankwise.planning.block import Block, Linear
from rankwise.planning.tape import Tape

Form = Literal["lora", "dora", "adalora", "full"]

_LAID_OUT = 8 * 2**20  # kernels/lowrank.c, at most: wide words take less
_RANDOM_STATE = 5056  # bytes of torch.get_rng_state(), which a checkpointed block keeps beside its input


@dataclass(frozen=True)
class Manner:
    """How tokens go through: `width` is bytes of a number, `chunk` rows of logits at once, `classes` the words.

    `quantised`: weights are in codes, and the plain product makes each whole.  `supervised`: tokens whose loss counts.
    """

    tokens: int
    documents: int
    width: int
    compiled: bool
    form: Form
    supervised: int
    chunk: int
    classes: int
    dropout: bool = False
    quantised: bool = False
    checkpointing: bool = False
    layer_norm: bool = False


class Pass:
    """One micro-batch on a tape, after a first step: gradients of what is trained are there."""

    def __init__(self, tape: Tape, blocks: Sequence[Block], manner: Manner) -> None:
        self.tape, self.blocks, self.manner = tape, blocks, manner
        self.unit = manner.tokens * manner.width
        self.kept = 0  # bytes at the end of the forward pass

    def run(self) -> None:
        tape, manner = self.tape, self.manner
        hidden = self.blocks[0].hidden
        before = tape.alive
        stream = tape.new(self.unit * hidden)
        kept: list[list[list[int]]] = []
        inputs: list[int] = []
        states: list[int] = []
        passed = 0  # blocks below the lowest adapter, through which no gradient goes
        for block in self.blocks:
            reached = manner.form == "full" or len(kept) > 0
            below = stream
            if manner.checkpointing:  # where the random numbers stood; small, and in the way of what comes after
                states.append(tape.new(_RANDOM_STATE))
            stream, own = self._forward(block, reached)
            if not reached and not block.adapted:
                tape.drop(below)
                passed += 1
                tape.drop(*states)
                states.clear()
                continue
            inputs.append(below)
            if manner.checkpointing:
                tape.drop(*(one for group in own for one in group))
                own = []
            kept.append(own)
        final = tape.new(self.unit * hidden)
        self.kept = tape.alive - before
        state = tape.new(manner.supervised * hidden * manner.width)
        tape.drop(final)
        grad, gathered = self._trained_loss(hidden) if manner.form == "full" else (self._loss(hidden), [])
        flowing = tape.new(self.unit * hidden)
        tape.drop(grad)
        normed = tape.new(self.unit * hidden)
        tape.drop(flowing, stream)
        for block, source, own in zip(reversed(self.blocks[passed:]), reversed(inputs), reversed(kept), strict=True):
            if manner.checkpointing:
                again, own = self._forward(block, reached=True)
                tape.drop(again)
            normed = self._backward(block, own, normed)
            tape.drop(source)
        tape.drop(normed, state, *states, *gathered)

    # ── the head ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _loss(self, hidden: int) -> int:
        """The gradient of the hidden states, made chunk by chunk on the way forward."""
        tape, manner = self.tape, self.manner
        grad = tape.new(manner.supervised * hidden * manner.width)
        for at in range(0, manner.supervised, manner.chunk):
            elements = min(manner.chunk, manner.supervised - at) * manner.classes
            parts = [tape.new(elements * manner.width)]
            if not manner.compiled:  # in float32 the logits are their own wide copy
                parts += [tape.new(4 * elements) for _ in range(1 if manner.width == 4 else 2)]
            tape.drop(*parts)
        scaled = tape.new(manner.supervised * hidden * manner.width)
        tape.drop(grad)
        return scaled

    def _trained_loss(self, hidden: int) -> tuple[int, list[int]]:
        """The same by autograd, and the gradient of a head that is trained, which waits for the embedding's."""
        tape, manner = self.tape, self.manner
        gathered = tape.new(manner.classes * hidden * manner.width)
        grad = tape.new(manner.supervised * hidden * manner.width)
        for at in range(0, manner.supervised, manner.chunk):
            elements = min(manner.chunk, manner.supervised - at) * manner.classes
            wide = [tape.new(4 * elements) for _ in range(2 if manner.width == 4 else 3)]  # logits, their logarithms
            slope = tape.new(elements * manner.width)
            tape.drop(*wide)
            tape.drop(slope, tape.new(manner.classes * hidden * manner.width))
        return grad, [gathered]

    # ── one block ────────────────────────────────────────────────────────────────────────────────────────────────

    def _forward(self, block: Block, reached: bool) -> tuple[int, list[list[int]]]:
        """The next stream, and what is kept: into attention, of it, out of it; up, at the gate, down.

        `reached`: a gradient comes back to the block's input.  Where none does, nothing is kept before the first
        adapted layer.
        """
        tape, unit = self.tape, self.unit
        normed, norm = self._normed(block.hidden)
        turned = 2 if block.rotary and len(block.into) >= 3 else 0  # queries and keys: what they become is kept
        flows = [self._linear(linear, stays=n >= turned) for n, linear in enumerate(block.into)]
        mixed, inner, looked = self._attention(block, [y for y, _ in flows])
        into = [*norm, *(one for _, kept in flows for one in kept)]
        self._settle(normed, into, block.into)
        o = [self._linear(linear) for linear in block.out] or [(tape.new(unit * block.hidden), [])]
        if not self.manner.compiled:
            self._settle(mixed, inner, block.out)
        out = [one for _, kept in o for one in kept]
        attention = [into, [*inner, *looked], out]
        reached = reached or any(linear.rank for linear in block.into)
        if not reached:
            tape.drop(*(one for group in attention[:2] for one in group))
            attention = [[], [], out]
        between = tape.new(unit * block.hidden)
        tape.drop(*(y for y, _ in o))
        extra = [one for _ in range(max(0, block.norms - 2)) for one in [tape.new(unit * block.hidden)]]
        middle, norm = self._normed(block.hidden)
        ups = [self._linear(linear, stays=block.gated or not block.keeps_output) for linear in block.up]
        product, gate = self._gate(block, [y for y, _ in ups])
        up = [*norm, *(one for _, kept in ups for one in kept)]
        self._settle(middle, up, block.up)
        downs = [self._linear(linear) for linear in block.down] or [(tape.new(unit * block.hidden), [])]
        down = [one for _, kept in downs for one in kept]
        self._settle(product, down, block.down)
        after = tape.new(unit * block.hidden)
        tape.drop(*(y for y, _ in downs))
        if not (reached or any(linear.rank for linear in (*block.out, *block.up, *block.down))):
            tape.drop(between, *up, *extra, *gate)
            return after, [[], [], [], [], [], down]
        return after, [*attention, [between, *up, *extra], gate, down]

    def _backward(self, block: Block, kept: list[list[int]], grad: int) -> int:
        """The gradient of the block's input; all that was kept is given back on the way."""
        tape, unit = self.tape, self.unit
        into, inner, out, up, gate, down = kept
        pulled = [self._pulled(linear) for linear in block.down] or [tape.new(unit * block.ffn)]
        tape.drop(*down)
        halves = [tape.new(unit * block.ffn) for _ in range(2 if block.gated else 1)]
        if not self.manner.compiled:
            halves.append(tape.new(unit * block.ffn))
        tape.drop(*pulled, *gate)
        back = [self._pulled(linear) for linear in block.up] or [tape.new(unit * block.hidden)]
        tape.drop(*halves, *back[1:])
        grad = self._unnormed(block.hidden, grad, back[0])
        tape.drop(*up)
        pulled = [self._pulled(linear) for linear in block.out] or [tape.new(unit * block.q)]
        tape.drop(*out)
        turned = [tape.new(unit * width) for width in (block.q, block.kv, block.kv)]
        if self.manner.compiled:  # float32 sums of the gradients of keys and values, a head of queries each
            tape.drop(*(tape.new(4 * self.manner.tokens * block.q) for _ in range(2)))
        else:  # the gradient of a slice is as large as the whole
            whole = [tape.new(unit * width) for width in (block.q, block.kv, block.kv)]
            tape.drop(*turned)
            turned = whole
        tape.drop(*pulled, *inner)
        if block.rotary:
            back = [self._turned(width) for width in (block.q, block.kv)]
            tape.drop(*turned[:2])
            turned = [*back, turned[2]]
        back = [self._pulled(linear) for linear in block.into] or [tape.new(unit * block.hidden)]
        tape.drop(*turned, *back[1:])
        grad = self._unnormed(block.hidden, grad, back[0])
        tape.drop(*into)
        return grad

    # ── its parts ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _norm_in_one(self) -> bool:
        """Whether a norm is one operation: the compiled one has no gradient of its own weight."""
        return self.manner.layer_norm or (self.manner.compiled and self.manner.form != "full")

    def _normed(self, hidden: int) -> tuple[int, list[int]]:
        """The norm's output, and what it keeps beside its input."""
        tape, manner = self.tape, self.manner
        kept = [tape.new(4 * manner.tokens)]
        if self._norm_in_one:
            return tape.new(self.unit * hidden), kept
        wide = 4 * manner.tokens * hidden
        if manner.width < 4:
            kept.append(tape.new(wide))  # the float32 copy that it is computed from
        squares = tape.new(wide)
        tape.drop(squares)
        scaled = tape.new(wide)
        out = tape.new(self.unit * hidden)
        tape.drop(scaled)
        return out, kept

    def _unnormed(self, hidden: int, grad: int, pulled: int) -> int:
        tape, manner = self.tape, self.manner
        wide = [] if self._norm_in_one else [tape.new(4 * manner.tokens * hidden) for _ in range(2)]
        through = tape.new(self.unit * hidden)
        tape.drop(*wide, pulled)
        total = tape.new(self.unit * hidden)
        tape.drop(through, grad)
        return total

    def _settle(self, x: int, kept: list[int], linears: Sequence[Linear]) -> None:
        """An input is kept where a gradient of A (or of the weight) needs it, and given back where not."""
        if self.manner.form == "full" or any(linear.rank for linear in linears):
            kept.append(x)
        else:
            self.tape.drop(x)

    @property
    def _whole(self) -> bool:
        """Whether a weight is made whole for its product: the compiled one decodes it panel by panel."""
        return self.manner.quantised and not self.manner.compiled

    def _laid_out(self, linear: Linear) -> list[int]:
        """What of a weight the compiled product has laid out anew at once."""
        size = linear.size * self.manner.width
        return [self.tape.new(min(size, _LAID_OUT))] if self.manner.compiled and self.manner.form != "full" else []

    def _linear(self, linear: Linear, *, stays: bool = False) -> tuple[int, list[int]]:
        """The output, and what is kept beside the input; `stays`: what follows keeps the output too."""
        tape, manner, rank = self.tape, self.manner, linear.rank
        whole = [tape.new(linear.size * manner.width)] if self._whole else []
        y = tape.new(self.unit * linear.outputs)
        tape.drop(*whole, *self._laid_out(linear))
        if not rank:
            return y, []
        kept = [tape.new(manner.tokens * linear.inputs)] if manner.dropout else []
        if manner.width < 4 and not manner.compiled:
            kept += [tape.new(rank * side * manner.width) for side in (linear.inputs, linear.outputs)]
        wide = -(-rank // LANES) * LANES if manner.compiled else rank
        kept += [tape.new(self.unit * wide) for _ in range(2 if manner.form == "adalora" else 1)]
        if manner.form == "dora" and not stays:  # the magnitude's gradient needs the output
            kept.append(tape.new(self.unit * linear.outputs))
        return y, kept

    def _pulled(self, linear: Linear) -> int:
        """The gradient of the input; those of A and B, or of the weight, are made on the way."""
        tape, manner, rank = self.tape, self.manner, linear.rank
        whole = [tape.new(linear.size * manner.width)] if self._whole else []
        dx = tape.new(self.unit * linear.inputs)
        tape.drop(*whole, *self._laid_out(linear))
        if manner.form == "full":
            tape.drop(tape.new(linear.size * 4))
        if not rank:
            return dx
        shrunk = tape.new(self.unit * rank)
        for side in (linear.inputs, linear.outputs):
            rounded = tape.new(rank * side * manner.width)
            gradient = tape.new(rank * side * 4)
            tape.drop(rounded, gradient)
        tape.drop(shrunk)
        return dx

    def _attention(self, block: Block, flows: list[int]) -> tuple[int, list[int], list[int]]:
        """Its output; what is kept of it; and what else."""
        tape, manner, unit = self.tape, self.manner, self.unit
        sums = tape.new(4 * manner.tokens * block.heads)
        kept = list(flows) or [tape.new(unit * width) for width in (block.q, block.kv, block.kv)]
        if block.rotary:
            turned = [self._turned(width) for width in (block.q, block.kv)]
            if len(flows) >= 3:  # of one fused projection the values are a part, and keep all of it
                tape.drop(*flows[:2])
                kept = flows[2:]
            kept += turned
        if block.head_norms:
            for width, heads in ((block.q, block.heads), (block.kv, block.heads * block.kv // block.q)):
                kept.append(tape.new(4 * manner.tokens * heads))
                kept.append(tape.new((unit if manner.compiled else 4 * manner.tokens) * width))
        mixed = tape.new(unit * block.q)
        if manner.compiled:
            return mixed, [*kept, mixed], [sums]
        alone = [tape.new(unit * block.q // manner.documents) for _ in range(manner.documents)]
        return mixed, kept, [sums, *alone]

    def _turned(self, width: int) -> int:
        """A rotary embedding's output; written out it is x · cos + cat(-x₂, x₁) · sin."""
        tape, unit = self.tape, self.unit
        if self.manner.compiled:
            return tape.new(unit * width)
        straight, half = tape.new(unit * width), tape.new(unit * width // 2)
        crossed = tape.new(unit * width)
        tape.drop(half)
        across = tape.new(unit * width)
        tape.drop(crossed)
        out = tape.new(unit * width)
        tape.drop(straight, across)
        return out

    def _gate(self, block: Block, flows: list[int]) -> tuple[int, list[int]]:
        tape, unit, manner = self.tape, self.unit, self.manner
        kept = list(flows) or [tape.new(unit * block.ffn) for _ in range(2 if block.gated else 1)]
        extra = block.activation_keeps + (1 if block.gated and not manner.compiled else 0)
        kept += [tape.new(unit * block.ffn) for _ in range(extra)]
        product = tape.new(unit * block.ffn)
        if block.keeps_output and not block.gated and any(linear.rank for linear in block.down):
            tape.drop(*kept)  # the product is kept by the layer that takes it
            kept = []
        return product, kept
