"""The parts of an adapter against singular values of the whole change, in float64."""

import pytest
import torch

from rankwise.adapters.lowrank import LowRank, SiteShape
from rankwise.adapters.parts import core_of, parts_of

SHAPES = [SiteShape(12, 9), SiteShape(9, 12), SiteShape(6, 4, (3, 2)), SiteShape(7, 3, (2, 2, 2)), SiteShape(5, 40)]
NARROW = [SiteShape(3, 12), SiteShape(12, 3)]
RANK = 4


def factors(shape, rank=RANK, scale=1.7, dropout=0.1):
    A, B = (torch.randn(size) for size in shape.factor_shapes(rank))
    return LowRank(A, B, scale, dropout)


def changed(parts):
    """Σ λ·u·vᵀ as a matrix."""
    return parts.left.double() * parts.values.double() @ parts.right.double()


def delta(own):
    return own.delta(torch.float64).flatten(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_parts_together_are_the_change(shape):
    own = factors(shape)
    torch.testing.assert_close(changed(parts_of(own)), delta(own), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_root_they_are_the_singular_triplets(shape):
    own = factors(shape)
    found = parts_of(own)
    want = torch.linalg.svdvals(delta(own))[:RANK]
    torch.testing.assert_close(found.values.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.weights, found.values.square(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.left.t() @ found.left, torch.eye(RANK), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_a_site_narrower_than_the_rank_has_as_many_parts_as_it_is_wide(shape):
    own = factors(shape)
    found = parts_of(own)
    assert len(found) == len(found.weights) == 3
    torch.testing.assert_close(changed(found), delta(own), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.switchable().delta(), own.delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_core_is_the_change_between_orthonormal_bases_and_its_gradient_that_of_the_factor(shape):
    own = factors(shape)
    core = core_of(own)
    for basis in (core.left, core.right):
        torch.testing.assert_close(basis.t() @ basis, torch.eye(RANK).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(core.left @ core.core @ core.right.t(), delta(own), rtol=1e-6, atol=1e-6)
    trainable = core.trainable()
    torch.testing.assert_close(trainable.delta(), own.delta(), rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(delta(own)).float()  # of a loss that is linear in the change
    A, B = trainable.factors()
    (B.flatten(1) @ A.flatten(1) * weights).sum().backward()
    want = core.left.t() @ weights.double() @ core.right
    torch.testing.assert_close(trainable.A.grad.flatten(1).double() @ core.right, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", range(RANK + 1))
def test_with_a_root_the_first_parts_come_as_near_as_any_to_what_the_layer_adds(count):
    """The optimum is known: the singular values of s·B·A·C^½, C = E[x·xᵀ], beyond the first so many."""
    own = factors(SiteShape(12, 9))
    core = core_of(own)
    x = torch.randn(200, 9, dtype=torch.float64) * torch.tensor([10.0, 5, 3, 1, 1, 0.3, 0.1, 0.1, 0.01])
    shrunk = x @ core.right
    found = core.parts(inputs=torch.linalg.cholesky(shrunk.t() @ shrunk / len(x)))
    first = (found.left * found.values)[:, :count].double() @ found.right[:count].double()
    missed = (x @ (delta(own) - first).t()).square().sum() / len(x)
    best = torch.linalg.svdvals(x @ delta(own).t())[count:].square().sum() / len(x)
    assert float(missed) == pytest.approx(float(best), rel=1e-5, abs=1e-6)
    assert float(found.weights[count:].double().sum()) == pytest.approx(float(best), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found.left.t() @ found.left, torch.eye(RANK), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", range(RANK + 1))
def test_with_two_roots_no_other_sum_of_so_many_parts_comes_nearer_between_them(shape, count):
    own = factors(shape)
    core = core_of(own)
    outputs, inputs = torch.randn(2, RANK, RANK, dtype=torch.float64)
    found = core.parts(outputs, inputs)
    torch.testing.assert_close(changed(found), delta(own), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.left.norm(dim=0), torch.ones(RANK))
    torch.testing.assert_close(found.right.norm(dim=1), torch.ones(RANK))
    first = (found.left * found.values)[:, :count].double() @ found.right[:count].double()
    missed = outputs.t() @ core.left.t() @ (delta(own) - first) @ core.right @ inputs
    best = torch.linalg.svdvals(outputs.t() @ core.core @ inputs)[count:].square().sum()
    assert float(missed.square().sum()) == pytest.approx(float(best), rel=1e-4, abs=1e-4)
    assert float(found.weights[count:].double().sum()) == pytest.approx(float(best), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", [*SHAPES, *NARROW], ids=str)
@pytest.mark.parametrize("rank", [0, 1, RANK])
def test_directions_that_no_input_uses_are_parts_all_the_same(shape, rank):
    """What a layer's inputs on these documents do not use may be used by others."""
    own = factors(shape)
    core = core_of(own)
    out, into = core.core.shape
    root = torch.zeros(into, into, dtype=torch.float64)
    root[:, :rank] = torch.randn(into, into)[:, :rank]  # E[(Vᵀ·x)(Vᵀ·x)ᵀ] of so low a rank
    for outputs in (None, torch.randn(out, out, dtype=torch.float64)):
        found = core.parts(outputs, root)
        torch.testing.assert_close(changed(found), delta(own), rtol=1e-5, atol=1e-5)
        assert not found.weights[rank:].gt(1e-9).any()
        assert found.weights[: min(rank, len(found))].gt(1e-9).all()


def test_a_change_of_lower_rank_than_its_factors_has_parts_that_are_nothing():
    shape = SiteShape(12, 9)
    A, B = (torch.randn(size) for size in shape.factor_shapes(2))
    own = LowRank(torch.cat([A, A]), torch.cat([B, B], dim=1), 1.0)
    found = parts_of(own)
    assert found.values[2:].max() < 1e-6 * found.values[0]
    assert all(part.isfinite().all() for part in (found.left, found.values, found.right, found.weights))
    torch.testing.assert_close(changed(found), delta(own), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_parts_and_the_rest_add_up_and_keep_the_dropout(shape):
    own = factors(shape)
    found = parts_of(own)
    kept, rest = found.only([0, 2]), found.only([1, 3])
    assert (kept.rank, kept.scale, kept.dropout, kept.shape) == (2, 1.0, own.dropout, shape)
    torch.testing.assert_close(delta(kept) + delta(rest), delta(own), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept.A.flatten(1).norm(dim=1), kept.B.flatten(1).norm(dim=0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", [[], [1], [0, 3], [0, 1, 2, 3]], ids=str)
def test_parts_that_are_switched_off_are_as_if_they_had_been_cut_out(shape, kept):
    found = parts_of(factors(shape))
    switched = found.switchable()
    switched.leave_out_all_but(torch.tensor(kept, dtype=torch.long))
    torch.testing.assert_close(switched.delta(torch.float32), found.only(kept).delta(torch.float32))
    assert found.parameters == sum(torch.Size(size).numel() for size in shape.factor_shapes(1))
