"""Adapters as values made into one: against dense algebra, against PEFT's `add_weighted_adapter`, and in a model."""

import re

import peft
import pytest
import torch

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.combining import combine
from rankwise.adapters.lowrank import LowRank
from rankwise.adapters.recipe import METHODS, Recipe
from rankwise.adapters.spec import LoraSpec
from rankwise.adapters.tokens import TokenRows
from rankwise.errors import RankwiseWarning, SpecError
from rankwise.surgery.bank import Bank
from tests.grid import moved, relative, spec, trained
from tests.models import every_site, output, tiny, words

EVERY = ("words", "linear", "across", "line", "plane", "volume")


@pytest.fixture
def bank():
    """On a model with a layer of every kind; a and b differ in all that may differ."""
    with Bank(every_site()) as own:
        trained(own, "a", spec(EVERY, rank=4, alpha=6, dropout=0.1, rank_pattern={"linear": 2}))
        some = ("linear", "across", "plane", "words")
        trained(own, "b", spec(some, rank=3, alpha=5, scaling="alpha/sqrt(r)", dropout=0.1), seed=5)
        yield own


def pair(bank):
    return {name: bank.adapter(name) for name in ("a", "b")}


def deltas(adapter):
    """Of every site, in float64, written once more."""
    found = {}
    for path, own in adapter.sites.items():
        A, B = (factor.detach().double().flatten(1) for factor in own.plain().factors())
        found[path] = own.scale * B @ A
    return found


def summed(adapters, weights):
    found = {}
    for adapter, weight in zip(adapters.values(), weights, strict=True):
        for path, own in deltas(adapter).items():
            found[path] = found.get(path, 0) + weight * own
    return found


def same(got, want, rtol=1e-6):
    assert got.keys() == want.keys()
    for path, own in want.items():
        assert float((got[path] - own).norm()) <= rtol * float(own.norm()), path


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weights", [(1, 1), (0.7, -0.3), (-2, 0.01)], ids=str)
def test_cat_is_the_weighted_sum_on_every_kind_of_layer(bank, weights):
    made = combine(pair(bank), Recipe(weights=weights))
    same(deltas(made.adapter), summed(pair(bank), weights))
    assert made.error == 0
    ranks = {path: own.rank for path, own in made.adapter.sites.items()}
    assert ranks == {"words": 7, "linear": 5, "across": 7, "line": 4, "plane": 7, "volume": 4}
    assert all(tensor.dtype == torch.float32 for _, tensor in made.adapter.tensors())


def test_the_spec_says_of_every_site_what_it_has_become(bank):
    made = combine(pair(bank), Recipe(weights=(0.7, 0.3))).adapter
    assert (made.spec.form, made.spec.scaling, made.spec.dropout) == ("lora", "alpha/r", 0.1)
    assert set(made.spec.targets) == set(made.sites)
    for path, own in made.sites.items():
        assert made.spec.rank_at(path) == own.rank
        assert made.spec.scale_at(path) == pytest.approx(own.scale, rel=1e-12)


def test_svd_is_the_nearest_and_its_error_is_the_true_one(bank):
    made = combine(pair(bank), Recipe(method="svd", rank=2, weights=(1, -0.5)))
    want, got = summed(pair(bank), (1, -0.5)), deltas(made.adapter)
    assert {own.rank for own in made.adapter.sites.values()} == {2}
    missed = {path: float((want[path] - got[path]).norm()) for path in want}
    for path, own in want.items():
        assert made.errors[path] == pytest.approx(missed[path] / float(own.norm()), abs=1e-6)
        assert missed[path] == pytest.approx(float(torch.linalg.svdvals(own)[2:].norm()), abs=1e-5)
    total = sum(x**2 for x in missed.values()) / sum(float(own.norm()) ** 2 for own in want.values())
    assert made.error == pytest.approx(total**0.5, rel=1e-5)


def test_without_a_rank_it_is_the_largest_at_each_site(bank):
    made = combine(pair(bank), Recipe(method="svd"))
    ranks = {path: own.rank for path, own in made.adapter.sites.items()}
    assert ranks == {"words": 4, "linear": 3, "across": 4, "line": 4, "plane": 4, "volume": 4}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear"])
def test_what_one_adapter_alone_has_counts_as_beside_nothing(bank, method):
    recipe = Recipe(method=method, **({"density": 1.0} if Recipe(method=method).nature.density else {}))
    got = deltas(combine(pair(bank), recipe).adapter)
    for path in ("line", "volume"):
        own = deltas(bank.adapter("a"))[path]
        assert float((got[path] - own).norm()) <= 1e-5 * float(own.norm())


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_alone_and_one_beside_others_of_weight_zero_are_itself(bank, method):
    density = {"density": 1.0} if Recipe(method=method).nature.density else {}
    alone = combine({"a": bank.adapter("a")}, Recipe(method=method, **density))
    same(deltas(alone.adapter), deltas(bank.adapter("a")), 1e-5)
    beside = combine(pair(bank), Recipe(method=method, weights=(1, 0), **density))
    assert beside.adapter.digest() == alone.adapter.digest()
    assert beside.weights == {"a": 1, "b": 0}


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_an_adapter_alone_is_itself_to_the_bit(bank, method):
    assert combine({"a": bank.adapter("a")}, Recipe(method=method)).adapter.digest() == bank.adapter("a").digest()


def test_linear_is_told_apart_from_the_sum(bank):
    trained(bank, "c", spec(("linear", "plane"), rank=3, alpha=5), seed=9)
    trained(bank, "d", spec(("linear", "plane"), rank=3, alpha=4), seed=10)
    with pytest.warns(RankwiseWarning, match=r"linear adds up factors: its ΔW differs from the sum .* by \d+%"):
        made = combine({name: bank.adapter(name) for name in ("c", "d")}, Recipe(method="linear"))
    got, want = deltas(made.adapter), summed({name: bank.adapter(name) for name in ("c", "d")}, (1, 1))
    for path, own in want.items():
        assert made.errors[path] == pytest.approx(float((got[path] - own).norm() / own.norm()), rel=1e-5)


def test_the_inputs_stay_as_they_are_and_nothing_is_shared(bank):
    before = {name: own.digest() for name, own in pair(bank).items()}
    for method in METHODS:
        if method == "linear":
            continue
        made = combine(pair(bank), Recipe(method=method)).adapter
        with torch.no_grad():
            for own in made.sites.values():
                own.A.add_(1)
                own.B.add_(1)
    assert {name: own.digest() for name, own in pair(bank).items()} == before


def test_dare_follows_from_the_seed_and_from_each_site_alone(bank):
    def found(seed, *paths):
        some = {name: Adapter(own.spec, {path: own.sites[path] for path in paths}) for name, own in pair(bank).items()}
        return combine(some, Recipe(method="dare", seed=seed)).adapter

    whole = found(3, "words", "linear", "plane")
    assert (
        whole.digest() == found(3, "words", "linear", "plane").digest() != found(4, "words", "linear", "plane").digest()
    )
    assert torch.equal(whole.sites["linear"].A, found(3, "linear").sites["linear"].A)


def test_how_far_it_is_is_told(bank):
    told = []
    combine(pair(bank), Recipe(method="ties"), told.append)
    assert told == pytest.approx([n / 6 for n in range(1, 7)])


def test_the_record_is_json_and_says_what_was_done(bank):
    record = combine(pair(bank), Recipe(method="dare-ties", weights=(1, -1), density=0.25)).record()
    assert record["weights"] == {"a": 1, "b": -1}
    assert (record["method"], record["density"], record["seed"]) == ("dare-ties", 0.25, 0)
    assert record["errors"].keys() == record["ranks"].keys() == set(EVERY)
    assert "75 % of its entries dropped" in record["makes"]
    assert combine(pair(bank)).record()["density"] is None


# ── other forms and starts ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_residual_starts_and_adalora_add_what_they_change(method):
    with Bank(tiny("llama")) as bank:
        trained(bank, "pissa", spec(("q_proj", "up_proj"), init="pissa"))
        trained(bank, "olora", spec(("q_proj",), init="olora", alpha=4), seed=1)
        trained(bank, "adalora", spec(("q_proj", "down_proj"), form="adalora"), seed=2)
        bank.adapter("adalora").sites["model.layers.0.self_attn.q_proj"].leave_out_all_but(torch.tensor([0, 2]))
        adapters = {name: bank.adapter(name) for name in bank.names}
        made = combine(adapters, Recipe(method=method, weights=(1, 0.5, -0.7), rank=None if method == "cat" else 15))
        same(deltas(made.adapter), summed(adapters, (1, 0.5, -0.7)), 1e-5)
        bank.put("all", made.adapter)
        x = words(2)
        with torch.no_grad(), bank.use("all"):
            got = output(bank.model, x)
        clean = tiny("llama")
        with torch.no_grad():
            for path, own in summed(adapters, (1, 0.5, -0.7)).items():
                clean.get_submodule(path).weight += own
            want = output(clean, x)
        assert relative(got, want) < 1e-5


# ── PEFT ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_peft(bank, folder, names):
    for name in names:
        bank.save(name, folder / name)
    model = peft.PeftModel.from_pretrained(every_site(), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return model.eval()


@torch.no_grad()
def said(bank, adapter):
    bank.put("made", adapter)
    with bank.use("made"):
        found = output(bank.model, words(3))
    bank.remove("made")
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_cat_is_pefts(bank, tmp_path, weights):
    trained(bank, "c", spec(EVERY, rank=2, alpha=7), seed=7)
    theirs = in_peft(bank, tmp_path, ["a", "c"])
    theirs.add_weighted_adapter(["a", "c"], list(weights), "made", combination_type="cat")
    theirs.set_adapter("made")
    theirs.eval()  # the new layers have dropout of their own
    both = {name: bank.adapter(name) for name in ("a", "c")}
    with torch.no_grad():
        want = output(theirs, words(3))
    got = said(bank, combine(both, Recipe(weights=weights)).adapter)
    assert relative(got, want) < 1e-5
    assert relative(said(bank, bank.adapter("a")), want) > 1e-2


@pytest.mark.parametrize("method", ["svd", "linear", "ties_svd", "dare_linear_svd", "dare_ties_svd"])
@pytest.mark.filterwarnings("ignore")
def test_where_peft_does_the_same_it_says_the_same(tmp_path, method):
    """On layers of every kind that it can do: of convolutions its SVD knows two dimensions alone."""
    targets = ("words", "linear", "across", "plane")
    ours = {"ties_svd": "ties", "dare_linear_svd": "dare", "dare_ties_svd": "dare-ties"}.get(method, method)
    with Bank(every_site()) as bank:
        for seed, name in enumerate("ab"):
            trained(bank, name, spec(targets, rank=3, alpha=6 - seed), seed=seed)
        theirs = in_peft(bank, tmp_path, ["a", "b"])
        density = {"density": 1.0} if "-" in method or "_" in method else {}
        svd_rank = 3 if method.endswith("svd") else None
        how = {"combination_type": method, "svd_rank": svd_rank, **density}
        theirs.add_weighted_adapter(["a", "b"], [0.6, 0.6], "made", **how)
        theirs.set_adapter("made")
        with torch.no_grad():
            want = output(theirs, words(3))
        both = {name: bank.adapter(name) for name in ("a", "b")}
        made = combine(both, Recipe(method=ours, weights=(0.6, 0.6), **density))
        assert relative(said(bank, made.adapter), want) < 1e-5


@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear"])
@pytest.mark.filterwarnings("ignore")
def test_what_was_made_loads_in_peft_and_says_the_same_there(bank, tmp_path, method):
    made = combine(pair(bank), Recipe(method=method, weights=(0.7, -0.3))).adapter
    want = said(bank, made)
    bank.put("made", made)
    theirs = in_peft(bank, tmp_path, ["made"])
    with torch.no_grad():
        assert relative(output(theirs, words(3)), want) < 1e-5
    bank.load("again", tmp_path / "made")
    assert bank.adapter("again").digest() == bank.adapter("made").digest()


# ── what has no weight ───────────────────────────────────────────────────────────────────────────────────────────────


def with_norm(bank, name, seed=0, targets=("q_proj",), **settings):
    trained(bank, name, spec(targets, modules_to_save=("norm",), **settings), seed)
    return bank.adapter(name)


def test_what_one_has_or_all_have_alike_is_taken_as_it_is():
    with Bank(tiny("llama")) as bank:
        norm = with_norm(bank, "a")
        trained(bank, "b", spec(("v_proj",), trained_tokens=(3, 5)))
        own = {"a": norm, "b": bank.adapter("b"), "c": norm}
        made = combine(own, Recipe(weights=(0.5, 2, 1)))
        assert made.taken == {
            "model.norm": ("a", "c"),
            "model.embed_tokens": ("b",),
            "lm_head": ("b",),
        }
        assert made.record()["taken"]["model.norm"] == ["a", "c"]
        assert torch.equal(made.adapter.modules["model.norm"]["weight"], norm.modules["model.norm"]["weight"])
        assert torch.equal(made.adapter.tokens["lm_head"].rows, bank.adapter("b").tokens["lm_head"].rows)
        assert made.adapter.spec.modules_to_save == ("norm",)
        assert made.adapter.spec.trained_tokens == (3, 5)
        bank.put("made", made.adapter)


def refusal(adapters, **recipe):
    with pytest.raises(SpecError) as told:
        combine(adapters, Recipe(**recipe))
    return str(told.value)


def test_layers_trained_whole_that_differ_are_refused_and_left_out_they_are_no_matter():
    with Bank(tiny("llama")) as bank:
        own = {"a": with_norm(bank, "a"), "b": with_norm(bank, "b", 1)}
        assert "model.norm: trained whole, otherwise in each of a, b" in refusal(own)
        assert combine(own, Recipe(weights=(0, 1))).taken == {"model.norm": ("b",)}


def test_rows_of_tokens_that_differ_are_refused():
    rows = torch.randn(2, 32)
    made = {
        name: Adapter(LoraSpec(), {}, tokens={"embed": TokenRows(ids, rows)})
        for name, ids in (("a", [3, 5]), ("b", [3, 6]), ("c", [5, 3]))
    }
    assert "embed: rows of tokens, otherwise in each of a, b" in refusal({n: made[n] for n in "ab"})
    turned = Adapter(LoraSpec(), {}, tokens={"embed": TokenRows([5, 3], rows.flip(0))})
    assert combine({"a": made["a"], "c": turned}).taken == {"embed": ("a", "c")}  # rows go by their tokens


def test_a_layer_that_one_has_for_itself_and_another_changes_is_refused():
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(("q_proj",), modules_to_save=("lm_head",)))
        whole = bank.adapter("a")
        bank.remove("a")
        trained(bank, "b", spec(("lm_head",)))
        said = refusal({"a": whole, "b": bank.adapter("b")})
        assert "lm_head: trained whole in a, and b changes lm_head" in said
        assert "leave all but one of them out" in said


def test_dora_is_refused_with_a_way_out(bank):
    trained(bank, "m", spec(("linear",), form="dora"))
    said = refusal({**pair(bank), "m": bank.adapter("m")})
    assert "m is of form dora" in said
    assert "rankwise merge" in said
    assert combine({**pair(bank), "m": bank.adapter("m")}, Recipe(weights=(1, 1, 0))).weights["m"] == 0


def test_everything_that_is_in_the_way_is_told_at_once(bank):
    trained(bank, "m", spec(("linear",), form="dora"))
    small = LowRank(torch.randn(4, 5), torch.randn(6, 4), 1.0)
    odd = Adapter(LoraSpec(), {"across": small})
    said = refusal({**pair(bank), "m": bank.adapter("m"), "odd": odd}, method="linear")
    for piece in (
        "m is of form dora",
        "across: weights of several sizes: a 18 × 16, b 18 × 16, odd 6 × 5",
        "words and 1 more: linear needs factors of one rank: a 4, b 3",
        "linear: linear needs factors of one rank: a 2, b 3, m 3",
        "cat and svd take adapters of any rank",
    ):
        assert re.search(re.escape(piece), said), piece


def test_nothing_to_combine_is_an_error():
    with pytest.raises(SpecError, match="no adapter to combine"):
        combine({})


def test_what_is_moved_on_its_own_still_combines(bank):
    """An adapter in a bank is a view of it: the sum is of what is there now."""
    moved(bank, "a", seed=3)
    same(deltas(combine(pair(bank)).adapter), summed(pair(bank), (1, 1)))
