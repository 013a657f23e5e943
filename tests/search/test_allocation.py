"""Ranks by layer: found where one layer carries the signal, refused as noise, judged against chance."""

import numpy as np
import pytest
import torch

from rankwise.adapters.spec import LoraSpec
from rankwise.engine.run import Loop, Run
from rankwise.errors import SpecError
from rankwise.search.advisor import Advisor
from rankwise.search.allocation import RELIABLE, agreement, judged, patterned, sentence, shuffled
from rankwise.search.budget import BUDGETS
from rankwise.search.pack import Parts
from rankwise.search.statistics import Noise
from rankwise.search.study import Study
from rankwise.search.trials import Trials
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus, random_corpus, random_labelled
from tests.models import tiny

LAYERS = [f"layers.{block}.{name}" for block in range(4) for name in ("q", "k", "up")]
COSTS = {path: {"q": 64, "k": 48, "up": 80}[path.rpartition(".")[2]] for path in LAYERS}


def advisor(bank, folder, allocate, documents=None, **own):
    documents = documents or Parts(pattern_corpus(40), pattern_corpus(16, seed=1), pattern_corpus(16, seed=2))
    trials = Trials(bank, documents, Loop(batch_documents=4, max_steps=12), Study(folder / "s", {}), folder, pack=8)
    spec = LoraSpec(**{"rank": 4, "alpha": 8, "targets": "all-linear", **own})
    found = Advisor(trials, spec, Run(lr=1e-2), BUDGETS["express"], {"all-linear": 1}, allocate=allocate)
    found.noise = Noise(1e-6, 4)
    return found


# ── the gate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_noise_agrees_with_itself_only_where_cost_alone_speaks_and_is_refused():
    """Each half gives small layers more, as they cost less, and the rest by chance."""
    chance = np.random.default_rng(0)
    layers = [f"{block}.{kind}" for block in range(12) for kind in COSTS_OF]
    costs = {path: COSTS_OF[path.rpartition(".")[2]] for path in layers}
    plain, found = [], []
    for _ in range(200):
        halves = [{p: int(600 / costs[p]) + int(chance.integers(-2, 3)) for p in layers} for _ in range(2)]
        plain.append(np.corrcoef(*(list(half.values()) for half in halves))[0, 1])
        found.append(agreement(*halves, costs))
    assert np.mean(plain) > 0.8, "what a correlation without regard to cost would say"
    assert abs(np.mean(found)) < 0.05
    assert max(found) < RELIABLE


COSTS_OF = {"small": 40, "middle": 80, "large": 160}


def test_the_same_signal_in_both_halves_passes():
    ranks = {path: 1 + number % 5 for number, path in enumerate(LAYERS)}
    close = ranks | {LAYERS[0]: ranks[LAYERS[0]] + 1}
    assert agreement(ranks, ranks, COSTS) == pytest.approx(1)
    assert agreement(ranks, close, COSTS) > RELIABLE


@pytest.mark.parametrize(
    "ranks", [dict.fromkeys(LAYERS, 4), {path: rank for rank, path in enumerate(LAYERS[:3], start=1)}]
)
def test_ranks_that_are_alike_and_layers_that_are_too_few_cannot_be_compared(ranks):
    assert agreement(ranks, ranks, COSTS) is None


def test_shuffled_ranks_are_the_same_ones_elsewhere_with_as_nearly_as_many_parameters():
    ranks = {path: 1 + (7 * number) % 9 for number, path in enumerate(LAYERS)}
    found = shuffled(ranks, COSTS, seed=3)
    total = sum(ranks[path] * COSTS[path] for path in LAYERS)
    assert len({tuple(one.values()) for one in (*found, ranks)}) == len(found) + 1
    for one in found:
        assert sorted(one.values()) == sorted(ranks.values())
        assert sum(one[path] * COSTS[path] for path in LAYERS) == pytest.approx(total, rel=0.01)
    assert shuffled(ranks, COSTS, seed=3) == found
    assert shuffled(dict.fromkeys(LAYERS, 2), COSTS, seed=0) == []


# ── worlds of known truth ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by", ["activations", "gradients"])
def test_a_layer_that_carries_all_the_signal_is_found(tmp_path, by):
    """By gradients, one that others are small beside; by activations, one whose input has more than one direction."""
    model = tiny("llama")
    with torch.no_grad():
        blocks = model.model.layers
        if by == "gradients":  # what comes out of the others is made small, and so is what comes back
            for block in blocks:
                block.mlp.down_proj.weight.mul_(1e-3)
                block.self_attn.o_proj.weight.mul_(1e-3)
            loud, quiet = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
        else:  # all but q, k and v of the last block are given one direction alone
            for norm in (blocks[0].input_layernorm, *(block.post_attention_layernorm for block in blocks)):
                norm.weight.mul_(1e-3)[0] = 50.0
            loud, quiet = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    with Bank(model) as bank:
        found = advisor(bank, tmp_path, by)
        found.ask("allocation")
        found.trials.study.close()
    ranks = found.record["allocation"]["ranks"]
    assert ranks[loud] > 4 > ranks[quiet]


def test_noise_is_not_given_out(tmp_path):
    """Random tokens in a random model: what two halves say of its layers' inputs is chance."""
    documents = Parts(random_corpus([8] * 12), pattern_corpus(16, seed=1), pattern_corpus(16, seed=2))
    with Bank(tiny("llama")) as bank:
        found = advisor(bank, tmp_path, "activations", documents)
        found.ask("allocation")
        rows = found.trials.study.rows()
        found.trials.study.close()
    told = found.record["allocation"]
    assert told["verdict"] == "not reliable"
    assert told["agreement"] < RELIABLE
    assert rows == [], "nothing is trained"
    assert found.spec.rank_pattern == {}
    assert "not reliable and were not tried" in told["sentence"]


def world(chance, *, gain, apart=0.0, shuffles=4, seeds=3, documents=200):
    """Summed losses: allocations differ among themselves by `apart`, and ours is better than the uniform by `gain`."""
    items = chance.integers(5, 40, size=documents)
    common = chance.normal(size=(seeds, documents))

    def arm(level):
        return items * (2 + common + level + 0.02 * chance.normal(size=(seeds, documents)))

    levels = {f"shuffled {n}": apart * chance.normal() for n in range(shuffles)}
    ours = {"uniform": 0.0, "allocated": -gain + apart * chance.normal()}
    return {name: arm(level) for name, level in {**ours, **levels}.items()}, items


def better(found) -> bool:
    return all(one.interval()[1] < 0 for one in found.values())


def test_an_allocation_no_better_than_chance_is_hardly_ever_recommended():
    """Some allocations are better than the uniform one by luck; that ours is one of them says nothing."""
    chance = np.random.default_rng(1)
    worlds = [world(chance, gain=0.0, apart=0.02) for _ in range(400)]
    told = [judged(losses, items, None) for losses, items in worlds]
    assert np.mean([one["uniform"].interval()[1] < 0 for one in told]) > 0.25
    assert np.mean([better(one) for one in told]) < 0.035  # one side of 95 %


def test_one_that_is_better_than_both_is_recommended():
    chance = np.random.default_rng(2)
    worlds = [world(chance, gain=0.05, apart=0.003) for _ in range(100)]
    assert np.mean([better(judged(losses, items, None)) for losses, items in worlds]) > 0.9


def test_one_that_failed_or_has_no_two_to_stand_beside_is_not_judged():
    losses, items = world(np.random.default_rng(3), gain=1.0, shuffles=2)
    assert judged(losses | {"allocated": None}, items, None) is None
    assert judged(losses | {"shuffled 1": None}, items, None) is None


# ── in a search ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_tried_with_uniform_and_shuffled_and_what_is_better_goes_on(tmp_path):
    with Bank(tiny("llama")) as bank:
        found = advisor(bank, tmp_path, "gradients")
        found.ask("allocation")
        trained = [name for _, name, *_ in found.trials.study.rows()]
        found.trials.study.close()
    told = found.record["allocation"]
    assert told["agreement"] >= RELIABLE
    assert [point["name"] for point in told["points"]] == [
        "uniform",
        "allocated",
        *(f"shuffled {n}" for n in range(1, 5)),
    ]
    assert len(trained) == 6
    assert told["parameters"]["allocated"] <= told["parameters"]["uniform"] < 1.1 * told["parameters"]["allocated"]
    assert bool(found.spec.rank_pattern) == (told["verdict"] == "recommended")


def test_a_pattern_belongs_to_its_rank_and_keeps_alpha(tmp_path):
    ranks = {"model.layers.0.self_attn.q_proj": 7, "model.layers.1.self_attn.q_proj": 4}
    with Bank(tiny("llama")) as bank:
        found = advisor(bank, tmp_path, None)
        found.spec = patterned(found.spec, ranks)
        own, other = found.candidate().spec, found.candidate(8).spec
        found.trials.study.close()
    assert [own.rank_at(path) for path in ranks] == [7, 4]
    assert own.scale_at("model.layers.0.self_attn.q_proj") == pytest.approx(8 / 7)
    assert other.rank_pattern == {}


@pytest.mark.parametrize("held", [True, False])
def test_it_stays_only_if_new_documents_find_it_better_as_well(tmp_path, held):
    """Ranks that are taken from where they are needed lose; ranks that are given there win."""
    ranks = {
        f"model.layers.{block}.mlp.{kind}_proj": 8 if held else 1 for block in (0, 1) for kind in ("up", "gate", "down")
    }
    with Bank(tiny("llama")) as bank:
        found = advisor(bank, tmp_path, "gradients", rank=1 if held else 8, targets="mlp", alpha=32)
        found.trials.loop = found.trials.packs.loop = Loop(batch_documents=4, max_steps=60)
        found.ranks = (found.spec.rank,)
        found.spec = patterned(found.spec, ranks)
        told = {
            "uniform": {"mean": -1.0, "low": -2.0, "high": -0.5},
            "shuffled": {"mean": -1.0, "low": -2.0, "high": -0.5},
        }
        found.record["allocation"] = {
            "by": "gradients",
            "rank": found.spec.rank,
            "against": told,
            "verdict": "recommended",
        }
        found.ask("confirm")
        found.trials.study.close()
    allocation = found.record["allocation"]
    assert (allocation["confirmed"]["high"] < 0) == held
    assert allocation["verdict"] == ("recommended" if held else "not confirmed")
    assert bool(found.spec.rank_pattern) == held
    assert allocation["sentence"] == sentence(allocation)


def test_documents_of_another_task_are_refused(tmp_path):
    documents = Parts(random_labelled([9] * 6), random_labelled([9] * 4, 1), random_labelled([9] * 4, 2))
    with Bank(tiny("llama")) as bank:
        found = advisor(bank, tmp_path, "gradients", documents)
        with pytest.raises(SpecError, match="for another task"):
            found.ask("allocation")
        found.trials.study.close()
