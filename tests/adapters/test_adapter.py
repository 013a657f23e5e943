"""What a nested adapter's first directions are, by the formula; files and training are held elsewhere."""

from dataclasses import replace

import pytest
import torch

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.lowrank import LowRank
from rankwise.adapters.spec import LoraSpec
from rankwise.errors import SpecError

RULES = {"alpha/r": lambda r: 3 / r, "alpha/sqrt(r)": lambda r: 3 / r**0.5, "alpha": lambda r: 3}


def nested(**settings) -> Adapter:
    """Rank 6, but 2 at `small`; a convolution is among its sites."""
    chosen = LoraSpec(rank=6, alpha=3, rank_pattern={"small": 2}, dropout=0.1, **settings)
    generator = torch.Generator().manual_seed(0)
    sites = {}
    for path, shape in {"linear": (5, 7), "small": (4, 7), "plane": (5, 3, 3, 2)}.items():
        rank = chosen.rank_at(path)
        A = torch.randn(rank, *shape[1:], generator=generator)
        B = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
        sites[path] = LowRank(A, B, chosen.scale_at(path), chosen.dropout)
    return Adapter(chosen, sites, nested=(1, 2, 4, 6))


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("rule", RULES)
def test_a_prefix_is_the_formula_s_and_its_spec_says_so(rule, rank):
    whole = nested(scaling=rule)
    cut = whole.prefix(rank)
    assert cut.nested == ()
    for path, factors in whole.sites.items():
        r = min(rank, 2 if path == "small" else 6)
        A, B = (factor.detach().double().flatten(1) for factor in (factors.A, factors.B))
        want = RULES[rule](r) * B[:, :r] @ A[:r]
        torch.testing.assert_close(cut.sites[path].delta().flatten(1).double(), want, rtol=1e-5, atol=1e-6)
        assert (cut.sites[path].rank, cut.sites[path].dropout) == (r, 0.1)
        assert (cut.spec.rank_at(path), cut.spec.scale_at(path)) == (r, cut.sites[path].scale)
        assert cut.spec.alpha_at(path) == 3


def test_at_its_own_rank_it_is_the_adapter_itself():
    whole = nested()
    assert whole.prefix(6).digest() == whole.digest()


@pytest.mark.parametrize("rank", [-1, 0, 7])
def test_a_rank_that_it_has_not_is_refused_with_those_that_were_trained(rank):
    with pytest.raises(SpecError, match=r"ranks 1 to 6\n.*trained at ranks 1, 2, 4, 6"):
        nested().prefix(rank)


def test_one_that_is_not_nested_has_no_prefix():
    with pytest.raises(SpecError, match="not nested"):
        replace(nested(), nested=()).prefix(2)
