import torch

from rankwise.adapters.dropout import keep_mask, mixed


def test_keeps_the_asked_share():
    for dropout in (0.05, 0.1, 0.5):
        kept = keep_mask(torch.Size((300, 500)), dropout, 3, torch.device("cpu")).float().mean()
        assert abs(kept - (1 - dropout)) < 0.005


def test_depends_on_the_seed_alone():
    shape = torch.Size((7, 9))
    masks = [keep_mask(shape, 0.5, seed, torch.device("cpu")) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_the_first_rows_do_not_depend_on_how_many_follow():
    few, many = (keep_mask(torch.Size((n, 8)), 0.5, 5, torch.device("cpu")) for n in (3, 40))
    assert torch.equal(few, many[:3])


def test_mixed_seeds_do_not_collide_on_neighbours():
    seeds = {mixed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed(1, 2) != mixed(2, 1)
