"""What is taken for a block that a kernel can run, and what only looks like one."""

import pytest
import torch
from torch import Tensor, nn

from rankwise.engine.blocks import fused_blocks
from rankwise.kernels.library import native
from tests.models import tiny

compiled = pytest.mark.skipif(native() is None, reason="no compiled kernels on this machine")


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32).bfloat16(), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


class NormWithOptionalGate(Norm):
    """As Mamba2's: without its gate, on a probe, it is a plain norm."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * nn.functional.silu(gate))


class NormWithGate(Norm):
    """As Qwen3-Next's."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class NormThatRaises(Norm):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("needs more than a probe")


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down_proj = nn.Linear(48, 32)
        self.bfloat16().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class FeedForwardWithScale(FeedForward):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x)


class FeedForwardThatRaises(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("needs more than a probe")


@compiled
@pytest.mark.parametrize("block", [Norm, FeedForward])
def test_plain_ones_are_taken(block):
    with fused_blocks(nn.Sequential(block())) as count:
        assert count == 1


@compiled
@pytest.mark.parametrize(
    "block",
    [NormWithOptionalGate, NormWithGate, NormThatRaises, FeedForwardWithScale, FeedForwardThatRaises],
)
def test_those_that_take_more_or_break_on_the_probe_are_left_alone(block):
    with fused_blocks(nn.Sequential(block())) as count:
        assert count == 0


@compiled
def test_a_model_has_all_its_norms_and_feed_forwards_taken():
    with fused_blocks(tiny("llama", torch.bfloat16).requires_grad_(False)) as count:
        assert count == 2 * 3 + 1
