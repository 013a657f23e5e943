"""Leading directions against torch's own SVD, whole and in pieces, and PEFT's incremental PCA."""

import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA

from rankwise.adapters.directions import (
    Principal,
    leading_triplets,
    orthonormal,
    random_directions,
    triplets_within,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    left = orthonormal(torch.randn(rows, len(values), generator=generator(1)).double())
    right = orthonormal(torch.randn(columns, len(values), generator=generator(2)).double())
    return (left * values) @ right.t()


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (30, 30)], ids=str)
def test_triplets_within_a_whole_basis_are_the_svd(shape):
    matrix = torch.randn(shape, generator=generator()).double()
    basis = orthonormal(torch.randn(shape[0], min(shape), generator=generator(3)).double())
    if shape[0] > shape[1]:
        basis = orthonormal(matrix)
    left, values, right = triplets_within(basis, basis.t() @ matrix)
    torch.testing.assert_close((left * values) @ right, matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(right @ right.t(), torch.eye(min(shape)).double())
    assert (right.gather(1, right.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_both_sides_are_orthonormal_whatever_the_rank(rank):
    """As the gradient of a handful of tokens: vectors past its rank are of length 1 all the same."""
    matrix = torch.zeros(20, 30).double()
    if rank:
        matrix = with_spectrum(20, 30, torch.linspace(2, 1, rank).double())
    rows = random_directions(8, 30, generator()).double()
    basis = orthonormal(matrix @ rows.t())
    left, values, right = triplets_within(basis, basis.t() @ matrix)
    torch.testing.assert_close(left.t() @ left, torch.eye(8).double())
    torch.testing.assert_close(right @ right.t(), torch.eye(8).double())
    assert (values[rank:] < 1e-12).all()


@pytest.mark.parametrize("shape", [(200, 60), (60, 200)], ids=str)
def test_the_largest_of_many_are_found(shape):
    matrix = with_spectrum(*shape, 0.8 ** torch.arange(60).double())
    values, right = leading_triplets(matrix, 5, generator())
    _, want, vectors = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(values, want[:5])
    torch.testing.assert_close(right.abs(), vectors[:5].abs(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "count"), [((3, 50), 8), ((50, 3), 8), ((9, 12), 6)], ids=str)
def test_where_there_are_no_more_than_are_searched_for_it_is_exact(shape, count):
    matrix = torch.randn(shape, generator=generator()).double()
    values, right = leading_triplets(matrix, count, generator())
    _, want, vectors = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(values, want[:count])
    torch.testing.assert_close(right.abs(), vectors[:count].abs())


# ── rows in pieces ───────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of(count: int, far: float = 0.0) -> torch.Tensor:
    """Rows of 16 numbers, of falling variance, about a mean that may be far away."""
    scale = 0.7 ** torch.arange(16).double()
    turned = orthonormal(torch.randn(16, 16, generator=generator(5)).double())
    return (torch.randn(count, 16, generator=generator(6)).double() * scale) @ turned + far


@pytest.mark.parametrize("pieces", [[100], [40, 60], [1, 1, 5, 30, 63], [10] * 10], ids=str)
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_pieces_make_the_principal_components_of_the_whole(pieces, far):
    rows = rows_of(100, far)
    principal = Principal(16, generator())
    for piece in rows.split(pieces):
        principal.take(piece)
    _, values, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert principal.rows == 100
    torch.testing.assert_close(principal.directions.abs(), right.abs(), rtol=1e-6, atol=1e-6)
    shares = values.square() / values.square().sum()
    torch.testing.assert_close(torch.tensor(principal.shares), shares.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_few_directions_kept_it_is_pefts_incremental_pca(dtype):
    principal, theirs = Principal(8, generator()), IncrementalPCA(n_components=8)
    for piece in rows_of(100).to(dtype).split([30, 20, 50]):
        principal.take(piece)
        theirs.partial_fit(piece)
    tight = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(principal.directions.double(), theirs.components_.double(), **tight)
    assert principal.shares == pytest.approx(theirs.explained_variance_ratio_.tolist(), rel=1e-4)


def test_agreement_tells_directions_that_stay_from_those_that_turn():
    principal = Principal(2, generator())
    principal.take(torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]]))
    assert principal.agreement.tolist() == [0, 0]
    principal.take(torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 0, 2], [0, 0, -2]]))
    assert principal.agreement.tolist() == pytest.approx([1, 0], abs=1e-6)


def test_what_does_not_vary_has_no_share():
    principal = Principal(4, generator())
    principal.take(torch.ones(5, 6))
    assert principal.shares == [0.0] * 4
    torch.testing.assert_close(principal.directions @ principal.directions.t(), torch.eye(4))
