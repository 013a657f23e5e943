import math

import pytest
import torch

from rankwise.adapters.lowrank import LowRank, SiteShape

SHAPES = [SiteShape(6, 4), SiteShape(5, 3, (3, 2)), SiteShape(2, 7, (3,)), SiteShape(3, 2, (1, 2, 3))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_is_the_sum_over_rank_one_terms(shape):
    (A_shape, B_shape), scale = shape.factor_shapes(3), 0.7
    factors = LowRank(torch.randn(A_shape), torch.randn(B_shape), scale)
    want = torch.zeros(shape.outputs, shape.inputs, *shape.kernel, dtype=torch.float64)
    for r in range(3):
        column = factors.B[:, r].reshape(-1, *(1 for _ in want.shape[1:])).double()
        want += scale * column.detach() * factors.A[r].detach().double()
    torch.testing.assert_close(factors.delta(torch.float64), want, rtol=1e-12, atol=1e-12, check_dtype=True)
    assert factors.shape == shape
    assert factors.rank == 3
    assert math.isclose(factors.delta_norm(), float(want.norm()), rel_tol=1e-9)
    assert shape.parameters(3) == factors.A.numel() + factors.B.numel()


def test_the_guides_example_of_parameters_saved():
    shape = SiteShape(4096, 4096)
    assert shape.parameters(8) == 65_536
    assert 4096 * 4096 == 16_777_216
