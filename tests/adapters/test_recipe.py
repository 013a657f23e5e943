import re

import pytest

from rankwise.adapters.recipe import METHODS, NATURES, Recipe
from rankwise.errors import SpecError


def test_every_method_says_what_it_makes_and_what_was_chosen():
    assert tuple(NATURES) == METHODS
    for method in METHODS:
        recipe = Recipe(method=method)
        assert "{" not in recipe.makes
        assert recipe.chosen.keys() == {
            "weights",
            *(["rank"] if method not in ("cat", "linear") else []),
            *(["density"] if method in ("ties", "dare", "dare-ties", "knots") else []),
            *(["seed"] if method.startswith("dare") else []),
        }
    asked = Recipe(method="dare-ties", weights=(1, 2), rank=3, density=0.25, seed=4)
    assert asked.chosen == {}
    assert "75 % of its entries dropped" in asked.makes


def test_density_is_the_methods_own_until_somebody_says_otherwise():
    kept = {method: Recipe(method=method).kept for method in METHODS}
    assert kept == {"cat": 1, "svd": 1, "linear": 1, "ties": 0.2, "dare": 0.5, "dare-ties": 0.5, "knots": 1}
    assert Recipe(method="ties", density=0.7).kept == 0.7


def test_weights_are_read_from_text_and_belong_to_names():
    assert Recipe(weights="0.7,-0.3").weights == (0.7, -0.3)
    assert Recipe(weights="0.7,-0.3").weights_of(["a", "b"]) == {"a": 0.7, "b": -0.3}
    assert Recipe().weights_of(["a", "b"]) == {"a": 1, "b": 1}
    with pytest.raises(SpecError, match=r"1 weight for 2 adapters \(a, b\)"):
        Recipe(weights="2").weights_of(["a", "b"])
    with pytest.raises(SpecError, match="no adapter to combine"):
        Recipe().weights_of([])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "tie"}, "did you mean 'ties'"),
        ({"weights": "a,1"}, "weights"),
        ({"weights": "nan,1"}, "finite"),
        ({"weights": (0, 0)}, "weights are all 0"),
        ({"method": "svd", "rank": 0}, "rank = 0"),
        ({"method": "ties", "density": 0}, "density = 0"),
        ({"method": "ties", "density": 1.5}, "density = 1.5"),
        ({"method": "dare", "seed": -1}, "seed = -1"),
        ({"rank": 4}, "rank = 4: not of method cat"),
        ({"method": "linear", "rank": 4}, "rank = 4: not of method linear"),
        ({"method": "svd", "density": 0.5}, "density = 0.5: not of method svd"),
        ({"method": "ties", "seed": 1}, "seed = 1: not of method ties"),
        ({"dnsity": 0.5}, "did you mean 'density'"),
    ],
)
def test_what_makes_no_sense_is_told(wrong, said):
    with pytest.raises(SpecError, match=re.escape(said)):
        Recipe(**wrong)


def test_everything_that_is_wrong_is_told_at_once():
    with pytest.raises(SpecError) as told:
        Recipe(method="svd", density=0.3, seed=3, weights="0,0")
    assert all(word in str(told.value) for word in ("density = 0.3", "seed = 3", "weights are all 0"))
    with pytest.raises(SpecError) as told:
        Recipe(method="sdv", rank=0, density=2)
    assert all(word in str(told.value) for word in ("did you mean 'svd'", "rank = 0", "density = 2"))
