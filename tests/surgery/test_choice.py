"""Which layers are adapted: the same as PEFT adapts for the same words, and an error where words mean nothing."""

import itertools
import warnings

import peft
import pytest
from peft.tuners.lora import LoraLayer
from torch import nn

from rankwise.adapters.spec import LoraSpec
from rankwise.errors import TargetError
from rankwise.planning.memory import ranks_of
from rankwise.planning.request import PlanRequest
from rankwise.planning.shapes import shapes_of
from rankwise.surgery.sites import choose_sites, find_sites
from tests.models import ARCHITECTURES, CAUSAL, tiny
from tests.planning.test_shapes import CONFIGS, on_meta, read_back

NAMES = ["llama-tied", "gemma3", "gpt2", "gpt-neox", "mixtral", "bert", "roberta", "distilbert", "t5", "bart", "vit"]
BLOCKS = [None, 0, [1], [0, 1]]
EXCLUDED = [None, "the first", r".*\.0\..*", r".*(q|attn|dense|v_proj|query).*"]
# PEFT counts experts and routers as linear, which are no layers that can be adapted here.
ALL_LINEAR = [name for name in CAUSAL if name != "mixtral"]
CASES = [case for case in itertools.product(NAMES, BLOCKS, EXCLUDED) if case[0] != "bart" or case[1] in (None, 0)]


def ours(model: nn.Module, **words) -> set[str] | None:
    """Paths, or None where nothing is left."""
    sites = find_sites(model)
    try:
        return {site.path for site in choose_sites(LoraSpec(**words), sites, list(dict(model.named_modules())))}
    except TargetError:
        return None


def theirs(model: nn.Module, **words) -> set[str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = peft.get_peft_model(model, peft.LoraConfig(**words)).base_model.model
        except ValueError:  # nothing is left
            return None
    return {path for path, module in wrapped.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(("name", "blocks", "excluded"), CASES, ids=str)
def test_the_same_words_mean_the_same_layers_to_peft(name, blocks, excluded):
    targets = list(ARCHITECTURES[name].targets)
    left_out = targets[:1] if excluded == "the first" else excluded
    want = theirs(tiny(name), target_modules=targets, layers_to_transform=blocks, exclude_modules=left_out)
    got = ours(
        tiny(name),
        targets=tuple(targets),
        layers="" if blocks is None else blocks,
        exclude=left_out if isinstance(left_out, str) else tuple(left_out or ()),
    )
    assert got == want


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_exclusions_take_out_of_all_linear_what_peft_takes_out(name):
    pattern = r".*\.0\..*(proj|attn|dense|fc1|fc2)"
    want = theirs(tiny(name), target_modules="all-linear", exclude_modules=pattern)
    assert want != theirs(tiny(name), target_modules="all-linear")
    assert ours(tiny(name), targets="all-linear", exclude=pattern) == want


def test_a_layer_named_by_its_whole_path_is_taken_wherever_it_stands():
    found = ours(tiny("llama"), targets=("lm_head", "model.layers.0.mlp.up_proj", "q_proj"), layers=1)
    assert found == {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"}


def test_of_two_stacks_a_number_means_the_block_of_each_and_an_exclusion_one_of_them():
    both = ours(tiny("t5"), targets=("q",), layers=1)
    assert {path.split(".")[0] for path in both} == {"encoder", "decoder"}
    one = ours(tiny("t5"), targets=("q",), layers=1, exclude=r"decoder\..*")
    assert one == theirs(tiny("t5"), target_modules=r"encoder\.block\.1\..*\.q")


def test_a_stack_at_the_top_is_one_too():
    """PEFT finds blocks there only where it is told the stack's name."""
    model = tiny("vit").vit
    want = theirs(tiny("vit").vit, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert ours(model, targets=("q_proj",), layers=1) == want == {"layers.1.attention.q_proj"}


def refused(name: str, **words) -> str:
    model = tiny(name)
    with pytest.raises(TargetError) as caught:
        choose_sites(LoraSpec(**words), find_sites(model), list(dict(model.named_modules())))
    return str(caught.value)


def test_every_word_that_means_nothing_is_told_at_once():
    text = refused(
        "llama",
        targets=("q_proj", "v_porj"),
        exclude=("k_porj", "norm", "layers.0"),
        layers="0,3-5,9-",
        rank_pattern={"x": 2},
    )
    for piece in (
        "'v_porj' matches no layer; did you mean 'v_proj'?",
        "exclude 'k_porj' matches no layer; did you mean 'k_proj'?",
        "exclude 'norm' is a module that cannot be adapted",
        r"exclude 'layers.0' is a module that cannot be adapted; the layers inside it are",
        r"the regular expression (.*\.)?layers\.0\..*",
        "layers 3-5,9-: none of the targeted layers stands there, only in blocks 0 to 1",
        "rank_pattern 'x' matches none",
        "→ layers here: ",
    ):
        assert piece in text


def test_a_pattern_that_means_a_block_and_no_layer_says_how_to_mean_its_layers():
    text = refused("llama", exclude=r".*\.layers\.0")
    assert (
        r"exclude '.*\\.layers\\.0' match no layer; it means modules that hold layers, which .*\.layers\.0\..* means"
        in text
    )
    assert ours(tiny("llama"), exclude=r".*\.layers\.0\..*") == ours(tiny("llama"), layers=1)


@pytest.mark.parametrize(
    "words",
    [{"exclude": "all-linear"}, {"exclude": r".*\.0\..*", "layers": 0}, {"targets": ("lm_head",), "exclude": ".*head"}],
)
def test_nothing_left_is_an_error(words):
    assert "exclude and layers leave none of the targeted layers" in refused("llama", **words)


def test_a_block_number_for_layers_in_no_block_is_an_error():
    assert "layers 0: none of the targeted layers stands there, which are in no blocks" in refused(
        "llama", targets=("lm_head",), layers=0
    )


ASKED = [
    {"layers": "1-"},
    {"layers": 0},
    {"exclude": "mlp"},
    {"exclude": r".*\.0\..*", "rank_pattern": {r".*\.1\..*": 2}},
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "opt"])
@pytest.mark.parametrize("words", ASKED)
def test_a_plan_counts_the_layers_that_surgery_adapts(name, words):
    spec = LoraSpec(targets="all-linear", **words)
    sites = find_sites(on_meta(CONFIGS[name]))
    want = {site.path: spec.rank_at(site.path) for site in choose_sites(spec, sites, [])}
    asked = {key: f"re:{value}" if value == r".*\.0\..*" else value for key, value in words.items()}
    assert ranks_of(shapes_of(read_back(CONFIGS[name]), {}, name), PlanRequest(**asked)) == want


def test_a_tied_head_may_be_left_out_of_a_plan_and_is_not_counted():
    shapes = shapes_of(read_back(CONFIGS["llama with biases, tied"]), {}, "x")
    assert ranks_of(shapes, PlanRequest(exclude="lm_head")) == ranks_of(shapes, PlanRequest())
    with pytest.raises(TargetError, match="lm_head: shares the embedding's weight"):
        ranks_of(shapes, PlanRequest(targets="lm_head,q_proj"))
