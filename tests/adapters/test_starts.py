import torch

from rankwise.adapters.lowrank import SiteShape
from rankwise.adapters.starts import start


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
