import pytest
import torch

from rankwise.adapters.lowrank import SiteShape
from rankwise.adapters.starts import gradient_start, start, weight_start
from rankwise.errors import SpecError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kaiming_is_loralibs():
    torch.manual_seed(0)
    want = torch.empty(8, 300)
    torch.nn.init.kaiming_uniform_(want, a=5**0.5)
    A, B = start("kaiming", SiteShape(20, 300), 8, generator())
    assert A.abs().max() <= want.abs().max() * 1.01
    assert abs(A.std() / want.std() - 1) < 0.05
    assert not B.any()


def test_gaussian_has_deviation_one_over_rank():
    A, B = start("gaussian", SiteShape(20, 4000), 8, generator())
    assert abs(A.std() * 8 - 1) < 0.02
    assert not B.any()


def test_a_lookup_starts_with_zero_rows():
    A, B = start("kaiming", SiteShape(30, 400), 5, generator(), lookup=True)
    assert not A.any()
    assert abs(B.std() - 1) < 0.15


def test_equal_seeds_equal_values_whatever_the_global_generator_did():
    first = start("kaiming", SiteShape(3, 4, (2,)), 2, generator(7))
    torch.randn(100)
    again = start("kaiming", SiteShape(3, 4, (2,)), 2, generator(7))
    other = start("kaiming", SiteShape(3, 4, (2,)), 2, generator(8))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 4, 3, 3)], ids=str)
def test_pissa_takes_the_largest_singular_triplets(shape):
    weight = torch.randn(shape, generator=generator())
    A, B = weight_start("pissa", weight, 4, 2.5, "site")
    left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    want = (left[:, :4] * values[:4]) @ right[:4]
    torch.testing.assert_close(2.5 * B.flatten(1).double() @ A.flatten(1).double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B.flatten(1).norm(dim=0), A.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-5)
    assert A.shape[1:] == weight.shape[1:]


def test_olora_takes_the_first_columns_and_rows_of_qr():
    weight = torch.randn(12, 30, generator=generator())
    A, B = weight_start("olora", weight, 4, 2.5, "site")
    torch.testing.assert_close(B.t() @ B, torch.eye(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B @ A[:, :4], weight[:, :4], rtol=1e-5, atol=1e-5)


def test_lora_ga_takes_the_first_right_vectors_and_the_next_left_ones_at_the_authors_size():
    """O is 16, and 16^¼/√16 is ½."""
    left, right = torch.randn(16, 4, generator=generator()), torch.randn(4, 3 * 2 * 2, generator=generator())
    A, B = gradient_start(left, right, SiteShape(16, 3, (2, 2)))
    torch.testing.assert_close(A, right[:2].reshape(2, 3, 2, 2) / 2)
    torch.testing.assert_close(B, left[:, 2:].reshape(16, 2, 1, 1) / 2)


def test_a_rank_that_the_weight_does_not_have_is_refused():
    with pytest.raises(SpecError, match=r"mlp\.0.*rank 5.*4 × 30"):
        weight_start("pissa", torch.randn(4, 30), 5, 1.0, "mlp.0")
