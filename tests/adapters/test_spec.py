import pytest

from rankwise.adapters.scaling import alpha_for, effective_scale
from rankwise.adapters.spec import LoraSpec, exactly
from rankwise.errors import SpecError


def test_the_three_scalings():
    assert effective_scale("alpha/r", 32, 16) == 2
    assert effective_scale("alpha/sqrt(r)", 32, 16) == 8
    assert effective_scale("alpha", 32, 16) == 32


@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)", "alpha"])
def test_the_alpha_of_another_rank_keeps_the_scale(rule):
    for rank in (1, 3, 16, 64):
        for other in range(1, 129):
            alpha = alpha_for(rule, 32, rank, other)
            assert effective_scale(rule, alpha, other) == pytest.approx(effective_scale(rule, 32, rank), rel=1e-12)
    assert [alpha_for("alpha/r", 32, 6, rank) for rank in (3, 6, 12)] == [16, 32, 64]


def test_an_exact_pattern_means_one_path_and_no_other():
    spec = LoraSpec(rank_pattern={exactly("layers.1.q"): 2})
    assert [spec.rank_at(path) for path in ("layers.1.q", "m.layers.1.q", "layersx1.q")] == [2, 16, 16]


def test_patterns_apply_per_site_and_the_first_match_wins():
    spec = LoraSpec(
        rank=8,
        alpha=16,
        rank_pattern={"layers.1.q_proj": 4, "q_proj": 2},
        alpha_pattern={r"layers\.\d+\.v_proj": 6},
    )
    assert [spec.rank_at(p) for p in ("m.layers.1.q_proj", "m.layers.0.q_proj", "m.layers.0.k_proj")] == [4, 2, 8]
    assert spec.scale_at("m.layers.0.v_proj") == 6 / 8
    assert spec.scale_at("m.layers.1.q_proj") == 16 / 4


def test_a_pattern_matches_whole_parts_only():
    assert LoraSpec(rank_pattern={"q_proj": 2}).rank_at("layers.0.xq_proj") == 16


@pytest.mark.parametrize(
    ("name", "rank", "alpha", "targets"),
    [
        ("quick", 8, 16, "minimal"),
        ("general", 16, 32, "attention"),
        ("complex", 32, 64, "all-linear"),
        ("limited", 4, 8, "minimal"),
    ],
)
def test_scenarios_are_the_guides(name, rank, alpha, targets):
    spec = LoraSpec.scenario(name)
    assert (spec.rank, spec.alpha, spec.targets) == (rank, alpha, targets)
    assert LoraSpec.scenario(name, rank=5).rank == 5


def test_an_unknown_scenario_is_named_with_the_nearest():
    with pytest.raises(SpecError, match="did you mean 'general'"):
        LoraSpec.scenario("genral")


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(SpecError) as caught:
        LoraSpec(rank=0, alpha=-1, dropout=1.0, form="dora?", ranks=3, targets=(), rank_pattern={"(": 3})
    text = str(caught.value)
    for piece in ("rank = 0", "alpha = -1", "dropout = 1.0", "form = 'dora?'", "did you mean 'rank'", "targets", "'('"):
        assert piece in text


def test_a_spec_is_a_value():
    assert LoraSpec(rank=4) == LoraSpec(rank=4)
    with pytest.raises(Exception, match="frozen"):
        LoraSpec().rank = 3
    assert LoraSpec(**LoraSpec(rank=4, targets=("q",)).model_dump(mode="json")) == LoraSpec(rank=4, targets=("q",))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(value):
    with pytest.raises(SpecError):
        LoraSpec(alpha=value)


@pytest.mark.parametrize(("init", "words"), [("eva", "both give the ranks out"), ("lora_ga", "leaves nothing of init")])
def test_form_adalora_has_a_start_of_its_own(init, words):
    with pytest.raises(SpecError, match=words):
        LoraSpec(form="adalora", init=init)
