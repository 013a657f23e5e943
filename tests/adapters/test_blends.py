"""What changes of one site become together, against dense algebra in float64 and against PEFT's functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import dare_linear, dare_ties
from peft.utils.merge_utils import ties as peft_ties

from rankwise.adapters.blends import added, dare, elected_mean, knots, linear, nearest, nearest_to, ties, trimmed
from rankwise.adapters.lowrank import LowRank, SiteShape

SHAPES = [SiteShape(12, 9), SiteShape(9, 12), SiteShape(6, 4, (3, 2)), SiteShape(7, 3, (2, 2, 2)), SiteShape(5, 40)]
EACH = pytest.mark.parametrize("shape", SHAPES, ids=str)
WHOLE = 10**6  # of rank: nothing is cut


def factors(shape, rank=3, scale=1.7, dropout=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(size, generator=generator) for size in shape.factor_shapes(rank))
    return LowRank(A, B, scale, dropout)


def delta(own):
    """S·B·A `[O, I·K]`, written once more."""
    return own.scale * own.B.detach().double().flatten(1) @ own.A.detach().double().flatten(1)


def dense(changes):
    """Weighted, one by one."""
    return [weight * delta(own) for weight, own in changes]


def some(shape):
    """Of different ranks, scales and signs."""
    return [(0.7, factors(shape)), (-1.3, factors(shape, 2, 0.5, seed=1)), (0.2, factors(shape, 1, 4.0, seed=2))]


def close(got, want, rtol=1e-6):
    """Relative to the norm, as the error that is printed."""
    assert float((got - want).norm()) <= rtol * float(want.norm())


# ── the sum ──────────────────────────────────────────────────────────────────────────────────────────────────────────

number = st.floats(-3, 3, allow_nan=False).filter(lambda x: abs(x) > 1e-3)
summand = st.tuples(number, st.integers(1, 6), st.floats(0.01, 10))


@settings(max_examples=60)
@given(st.lists(summand, min_size=1, max_size=4), st.sampled_from(SHAPES))
def test_side_by_side_they_are_the_sum_and_ranks_add_up(told, shape):
    changes = [(w, factors(shape, rank, scale, seed=n)) for n, (w, rank, scale) in enumerate(told)]
    whole = added(changes).float()
    assert whole.rank == sum(rank for _, rank, _ in told)
    assert whole.scale > 0
    largest = max(float(one.norm()) for one in dense(changes))
    assert float((delta(whole) - sum(dense(changes))).norm()) <= 1e-6 * largest


@settings(max_examples=60)
@given(st.lists(summand, min_size=1, max_size=4), st.sampled_from(SHAPES), st.integers(1, 8))
def test_the_error_of_a_cut_sum_is_the_true_one_and_none_could_be_smaller(told, shape, rank):
    changes = [(w, factors(shape, own, scale, seed=n)) for n, (w, own, scale) in enumerate(told)]
    whole = sum(dense(changes))
    blend = nearest(added(changes), rank)
    assert blend.factors.rank <= rank
    room = 2e-6 * float(max(one.norm() for one in dense(changes)))
    best = float(torch.linalg.svdvals(whole)[rank:].norm())
    assert blend.missed == pytest.approx(float((whole - delta(blend.factors)).norm()), abs=room)
    assert blend.missed == pytest.approx(best, abs=room)
    assert blend.meant == pytest.approx(float(whole.norm()), abs=room)


@EACH
def test_where_every_gain_is_the_same_the_factors_are_the_very_ones(shape):
    one, other = factors(shape, scale=2.0), factors(shape, 2, scale=4.0, seed=1)
    whole = added([(1.0, one), (0.5, other)])
    assert (whole.scale, whole.dropout) == (2.0, 0.1)
    assert torch.equal(whole.A, torch.cat([one.A, other.A]))
    assert torch.equal(whole.B, torch.cat([one.B, other.B], dim=1))
    alone = added([(1.0, one)])
    assert torch.equal(alone.A, one.A)
    assert alone.A.data_ptr() != one.A.data_ptr()  # a copy: training one of them leaves the other alone
    assert alone.scale == one.scale


def test_a_scale_is_never_negative():
    whole = added([(-1.0, factors(SHAPES[0]))])
    assert whole.scale == 1.0
    close(delta(whole), -delta(factors(SHAPES[0])))


def test_dropout_stays_where_all_have_the_same():
    shape = SHAPES[0]
    assert added([(1, factors(shape)), (1, factors(shape, seed=1, dropout=0.2))]).dropout == 0
    assert nearest(added([(1, factors(shape)), (2, factors(shape, seed=1))]), 2).factors.dropout == 0.1


@EACH
def test_factors_added_up_have_cross_terms_and_the_distance_to_the_sum_is_told(shape):
    changes = [(0.7, factors(shape)), (-0.4, factors(shape, seed=1))]
    (w, a), (v, b) = changes
    r, s = math.sqrt(w * a.scale), math.sqrt(-v * b.scale)
    A, B = ([x.detach().double().flatten(1) for x in pair] for pair in ((a.A, b.A), (a.B, b.B)))
    cross = -r * s * B[0] @ A[1] + r * s * B[1] @ A[0]
    blend = linear(changes)
    close(delta(blend.factors), sum(dense(changes)) + cross)
    assert blend.missed == pytest.approx(float(cross.norm()), rel=1e-6)
    assert blend.meant == pytest.approx(float(sum(dense(changes)).norm()), rel=1e-6)
    alone = linear(changes[:1])
    close(delta(alone.factors), dense(changes[:1])[0])
    assert alone.missed < 1e-6 * alone.meant


# ── matrices ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_trimming_keeps_the_largest(density):
    matrix = torch.randn(8, 10)
    got = trimmed(matrix, density)
    order = sorted(range(80), key=lambda i: -abs(float(matrix.flatten()[i])))
    kept = order[: max(1, round(density * 80))]
    want = torch.zeros(80)
    want[kept] = matrix.flatten()[kept]
    assert torch.equal(got.flatten(), want)


def test_trimming_treats_equals_alike():
    assert torch.equal(trimmed(torch.tensor([[1.0, -1.0], [0.5, 0.1]]), 0.25), torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_the_mean_is_of_those_that_agree_with_the_sums_sign():
    """And nobody wins a draw; in PEFT plus does."""
    rows = torch.tensor([[3.0, 3.0, 0.0, 2.0, -1.0], [1.0, -1.0, 2.0, -2.0, -3.0], [0.0, -1.0, 0.0, 0.0, 1.0]])
    got = elected_mean(lambda: (row[None] for row in rows))
    assert torch.equal(got, torch.tensor([[2.0, 3.0, 2.0, 0.0, -2.0]]))


@pytest.mark.parametrize("size", [(12, 9), (9, 12), (10, 10)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 9, 50])
def test_a_matrix_is_cut_to_the_nearest_of_a_rank_and_the_error_is_the_true_one(size, rank):
    matrix = torch.randn(size)
    blend = nearest_to(matrix, SiteShape(*size), rank, 0.1)
    own = blend.factors.float()
    assert own.rank == min(rank, *size)
    assert own.dropout == 0.1
    best = float(torch.linalg.svdvals(matrix.double())[rank:].norm())
    assert blend.missed == pytest.approx(best, abs=1e-5)
    assert blend.missed == pytest.approx(float((matrix - delta(own)).norm()), abs=1e-5)
    assert blend.meant == pytest.approx(float(matrix.double().norm()))
    torch.testing.assert_close(own.A.norm(dim=1), own.B.norm(dim=0), rtol=1e-4, atol=1e-5)  # shared evenly


@EACH
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_that_of_the_paper_with_the_weights_first(shape, density):
    changes = some(shape)
    stack = torch.stack([trimmed(one.float(), density) for one in dense(changes)]).double()
    want = torch.zeros_like(stack[0])
    for i in range(stack.shape[1]):
        for j in range(stack.shape[2]):
            column = stack[:, i, j]
            agreeing = [float(x) for x in column if float(x) * float(column.sum()) > 0]
            want[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    close(delta(ties(changes, WHOLE, density).factors), want, 1e-5)


@EACH
def test_with_one_weight_for_all_ties_is_pefts(shape):
    """PEFT elects before it weights, so that the two part where weights differ."""
    changes = [(0.6, own) for _, own in some(shape)]
    size = shape.outputs * shape.width
    density = (size // 2) / size  # PEFT rounds down
    want = peft_ties([delta(own).float() for _, own in changes], torch.tensor([0.6] * 3), density)
    close(delta(ties(changes, WHOLE, density).factors), want.double(), 1e-5)


@EACH
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_with_nothing_dropped_dare_is_the_sum_and_dare_ties_is_pefts(shape):
    changes = some(shape)
    got = dare(changes, WHOLE, 1.0, [0, 1, 2], elect=False).factors
    close(delta(got), sum(dense(changes)), 1e-5)
    theirs = dare_linear([delta(own).float() for _, own in changes], torch.tensor([w for w, _ in changes]), 1.0)
    close(delta(got), theirs.double(), 1e-5)
    same = [(0.6, own) for _, own in changes]
    want = dare_ties([delta(own).float() for _, own in same], torch.tensor([0.6] * 3), 1.0)
    close(delta(dare(same, WHOLE, 1.0, [0, 1, 2], elect=True).factors), want.double(), 1e-5)


def test_dare_drops_entries_by_chance_and_scales_up_what_is_left():
    shape = SiteShape(40, 50)
    changes = [(1.0, factors(shape, scale=1.0))]
    whole, kept = dense(changes)[0], delta(dare(changes, WHOLE, 0.25, [3], elect=False).factors)
    left = (kept / whole - 4).abs() < 1e-3
    gone = (kept / whole).abs() < 1e-3
    assert bool((left | gone).all())
    assert float(left.double().mean()) == pytest.approx(0.25, abs=0.04)
    # The mean of 300 is off by √((1/0.25 - 1)/300) of the norm, if each of them is right in the mean.
    means = torch.stack([delta(dare(changes, WHOLE, 0.25, [s], elect=False).factors) for s in range(300)]).mean(0)
    assert float((means - whole).norm() / whole.norm()) == pytest.approx(math.sqrt(3 / 300), rel=0.1)


def test_what_is_dropped_follows_from_the_seed_of_each():
    changes = [(1.0, own) for _, own in some(SHAPES[0])]

    def found(*seeds):
        return delta(dare(changes, WHOLE, 0.5, seeds, elect=True).factors)

    assert torch.equal(found(1, 2, 3), found(1, 2, 3))
    assert not torch.allclose(found(1, 2, 3), found(1, 2, 4))


# ── knots ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@EACH
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_knots_merges_in_the_basis_of_all_changes_side_by_side(shape, density):
    changes = some(shape)
    U, S, V = torch.linalg.svd(torch.cat(dense(changes), dim=1), full_matrices=False)
    real = len(S[S / S[0] > 1e-9])
    pieces = [S[:real, None] * piece for piece in V[:real].split(shape.width, dim=1)]
    density = round(density * pieces[0].numel()) / pieces[0].numel()  # PEFT rounds down
    want = U[:, :real] @ peft_ties(pieces, torch.ones(3, dtype=torch.float64), density)
    blend = knots(changes, WHOLE, density)
    assert blend.factors.rank == min(6, shape.outputs)
    close(delta(blend.factors), want, 1e-6)
    assert blend.missed == 0


def test_knots_is_cut_to_the_nearest_of_a_rank_with_the_true_error():
    changes = some(SHAPES[0])
    whole, cut = delta(knots(changes, WHOLE, 0.5).factors), knots(changes, 2, 0.5)
    assert cut.factors.rank == 2
    assert cut.missed == pytest.approx(float((whole - delta(cut.factors)).norm()), rel=1e-5)
    assert cut.missed == pytest.approx(float(torch.linalg.svdvals(whole)[2:].norm()), rel=1e-5)


def test_knots_turns_with_the_outputs_where_ties_does_not():
    """What it is for: signs compared in a basis that the changes share, whatever basis the layer's outputs have."""
    turn = torch.linalg.qr(torch.randn(12, 12))[0]
    changes = some(SHAPES[0])
    turned = [(w, LowRank(own.A, turn @ own.B, own.scale)) for w, own in changes]
    close(delta(knots(turned, WHOLE, 0.5).factors), turn.double() @ delta(knots(changes, WHOLE, 0.5).factors), 1e-5)
    other = turn.double() @ delta(ties(changes, WHOLE, 0.5).factors)
    assert float((delta(ties(turned, WHOLE, 0.5).factors) - other).norm()) > 0.1 * float(other.norm())


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────────

METHODS = {
    "svd": lambda changes: nearest(added(changes), 3),
    "linear": linear,
    "ties": lambda changes: ties(changes, 3, 1.0),
    "dare": lambda changes: dare(changes, 3, 1.0, [0], elect=False),
    "dare-ties": lambda changes: dare(changes, 3, 1.0, [0], elect=True),
    "knots": lambda changes: knots(changes, 3, 1.0),
}


@EACH
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_one_alone_is_itself_times_its_weight(method, shape, weight):
    own = factors(shape)
    blend = METHODS[method]([(weight, own)])
    assert blend.factors.shape == shape
    close(delta(blend.factors.float()), weight * delta(own), 1e-5)
    assert blend.missed <= 1e-5 * blend.meant
    assert blend.meant == pytest.approx(abs(weight) * own.delta_norm(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_changes_that_are_nothing_stay_nothing(method):
    shape = SHAPES[0]
    own = LowRank(torch.randn(3, 9), torch.zeros(12, 3), 1.0)
    blend = METHODS[method]([(1.0, own)])
    assert float(delta(blend.factors.float()).norm()) == blend.missed == blend.meant == 0
    assert blend.factors.shape == shape
