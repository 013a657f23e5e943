"""What is predicted against what autograd keeps, what the guides say, and what fits."""

import json

import numpy as np
import pytest
import torch
import transformers as hf

import rankwise
from rankwise.adapters.spec import LoraSpec
from rankwise.data.corpus import Corpus
from rankwise.engine.forward import Forward
from rankwise.errors import ModelError, SpecError, TargetError
from rankwise.kernels.library import native
from rankwise.planning.guide import GUIDE, reproduced
from rankwise.planning.held import BYTES_A_WEIGHT
from rankwise.planning.memory import Memory, memory_of, ranks_of
from rankwise.planning.plan import plan
from rankwise.planning.request import PlanRequest, machine_for
from rankwise.planning.shapes import shapes_of
from rankwise.surgery.bank import Bank
from rankwise.surgery.sites import choose_sites, find_sites
from tests.planning.test_shapes import CONFIGS, read_back

SEVEN = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
GIB = 2**30


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    path = tmp_path_factory.mktemp("seven") / "config.json"
    path.write_text(json.dumps(SEVEN))
    return path


def memory(**settings) -> Memory:
    request = PlanRequest(**{"device": "cuda", **settings})
    return memory_of(shapes_of(SEVEN, {}, "seven"), request, machine_for(request))


# ── what is held ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_and_adapters_to_the_byte():
    shapes = shapes_of(SEVEN, {}, "seven")
    assert shapes.parameters == 6_738_415_616  # Llama 2 7B's
    found = memory()
    assert found.weights == 2 * 6_738_415_616
    trained = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert (found.adapters, found.gradients, found.optimiser) == (4 * trained, 4 * trained, 8 * trained)
    outputs = 32 * (4 * 4096 + 2 * 11008 + 4096)
    dora = memory(method="dora")
    assert dora.gradients == 4 * (trained + outputs)
    assert dora.adapters == 4 * (trained + outputs) + 4 * (trained + 2 * outputs)  # and what its norms are of
    adalora = memory(method="adalora")
    assert adalora.gradients == 4 * (trained + 32 * 7 * 16)
    assert adalora.optimiser == 4 * adalora.gradients  # two moments; an average and its uncertainty


def test_quantised_weights_by_the_bit():
    linear = 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096
    rest = 2 * (6_738_415_616 - linear)
    assert memory(storage="int8").weights == round(linear * (1 + 4 / 64)) + rest
    assert memory(method="qlora").weights == round(linear * (0.5 + 1 / 64 + 4 / (64 * 256))) + rest
    assert BYTES_A_WEIGHT["nf4"] * 8 == pytest.approx(4.127, abs=1e-3)  # bits: arXiv:2305.14314 §3


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 16), ("bfloat16", 18)])
def test_full_fine_tuning(dtype, bytes_each):
    found = memory(method="full", dtype=dtype)
    held = found.weights + found.adapters + found.gradients + found.optimiser
    assert held == bytes_each * 6_738_415_616


# ── what autograd keeps ──────────────────────────────────────────────────────────────────────────────────────────────

SIZES = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 512}
GROUPED = {**SIZES, **HEADS, "num_key_value_heads": 2}
KEPT = {
    "llama": (hf.LlamaConfig(**GROUPED), {}),
    "llama, attention": (hf.LlamaConfig(**GROUPED), {"targets": "attention"}),
    "llama, minimal": (hf.LlamaConfig(**GROUPED), {"targets": "minimal", "rank": 4}),
    "llama, mlp": (hf.LlamaConfig(**GROUPED), {"targets": "mlp"}),
    "llama, dora": (hf.LlamaConfig(**GROUPED), {"form": "dora"}),
    "gpt2, dora": (hf.GPT2Config(vocab_size=96, n_embd=128, n_layer=3, n_head=4, n_positions=512), {"form": "dora"}),
    "llama, upper blocks": (hf.LlamaConfig(**GROUPED), {"layers": "1-", "exclude": ("q_proj",)}),
    "qwen3": (hf.Qwen3Config(**GROUPED, head_dim=32), {}),
    "gpt2": (hf.GPT2Config(vocab_size=96, n_embd=128, n_layer=3, n_head=4, n_positions=512), {}),
    "opt": (hf.OPTConfig(**{k: v for k, v in {**SIZES, **HEADS}.items() if k[0] != "i"}, ffn_dim=256), {}),
}
LENGTHS = [64] * 8


def kept_by_autograd(config: hf.PreTrainedConfig, dtype: torch.dtype, **spec: object) -> int:
    """Bytes of all that one packed micro-batch saves for its backward pass, each piece of memory once."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tokens = np.random.default_rng(0).integers(96, size=sum(LENGTHS)).astype(np.int32)
    mask = np.ones(len(tokens), dtype=bool)
    bounds = np.cumsum([0, *LENGTHS])
    mask[bounds[:-1]] = False
    lines = np.stack([np.zeros(len(LENGTHS)), 1 + np.arange(len(LENGTHS))], axis=1).astype(np.int64)
    corpus, documents = Corpus(tokens, mask, bounds, lines, ("x",)), range(len(LENGTHS))
    found: dict[int, int] = {}
    with Bank(model) as bank:
        bank.add("a", LoraSpec(**spec))
        own |= {parameter.untyped_storage().data_ptr() for _, parameter in bank.named_parameters("a")}
        for _, parameter in bank.named_parameters("a"):
            parameter.requires_grad_(True)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with Forward(bank) as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert forward.layout == "packed"
            forward.learn(corpus, documents, [("a", len(LENGTHS))], np.ones(len(LENGTHS)), 0)
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KEPT)
def test_activations_are_what_autograd_keeps(name, dtype):
    config, spec = KEPT[name]
    total = sum(LENGTHS)
    kernels = "compiled" if dtype == "bfloat16" and native() is not None else "plain"
    asked = {"micro_tokens": total, "batch_tokens": total, "document_tokens": LENGTHS[0], "kernels": kernels}
    wanted = {"method" if name == "form" else name: value for name, value in spec.items()}
    request = PlanRequest(device="cpu", dtype=dtype, **asked, **wanted)
    predicted = memory_of(shapes_of(read_back(config), {}, name), request, machine_for(request)).activations
    assert predicted == pytest.approx(kept_by_autograd(config, getattr(torch, dtype), **spec), rel=0.05)


def test_checkpointing_keeps_a_block_s_input_and_one_block():
    plain, less = memory(), memory(checkpointing=True)
    assert less.activations < plain.activations / 10
    assert plain.activations / 32 < less.activations + less.working < plain.activations / 4


def test_more_tokens_longer_ranks_and_dropout_take_more():
    base = memory(micro_tokens=1024)
    assert 1.9 < memory(micro_tokens=2048).activations / base.activations < 2.1
    assert memory(micro_tokens=1024, rank=64).adapters == 4 * base.adapters
    assert memory(micro_tokens=1024, dropout=0.1).activations > base.activations
    assert memory(micro_tokens=1024, method="dora").activations > base.activations
    assert memory(micro_tokens=1024, batch_tokens=512).activations < base.activations


# ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


TARGETS = ["minimal", "attention", "mlp", "all-linear", ("q_proj", "down_proj"), ".*1.*k_proj"]


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_mean_what_surgery_takes_them_to_mean(targets):
    config = CONFIGS["llama"]
    asked = f"re:{targets}" if targets == ".*1.*k_proj" else targets
    request = PlanRequest(targets=asked, rank=8, rank_pattern={"layers.1..*": 2})
    with torch.device("meta"):
        sites = find_sites(hf.AutoModelForCausalLM.from_config(config))
    spec = LoraSpec(targets=targets, rank=8, rank_pattern={"layers.1..*": 2})
    want = {site.path: spec.rank_at(site.path) for site in choose_sites(spec, sites, list(sites))}
    assert ranks_of(shapes_of(read_back(config), {}, "x"), request) == want


@pytest.mark.parametrize(
    "settings", [{"targets": "q_porj"}, {"targets": "re:nothing"}, {"rank_pattern": {"nothing": 3}}]
)
def test_targets_that_match_nothing_are_told(settings):
    with pytest.raises(TargetError, match=r"(?s)→ layers here: .*q_proj"):
        memory(**settings)


# ── the guides, what fits, the public name ───────────────────────────────────────────────────────────────────────────


def test_the_guides_table_is_reproduced_by_its_rules_and_put_right():
    assert reproduced() == {row.name: pytest.approx(row.told) for row in GUIDE}
    assert [row.told for row in GUIDE] == [112e9, 56e9, 28e9, 6e9]
    assert all(row.rule and row.wrong for row in GUIDE)


def test_the_best_that_fits_gives_up_what_costs_least(seven):
    roomy = plan(seven, device="cuda", memory="80GiB")["proposal"]
    assert (roomy["fits"], roomy["settings"]) == (True, {})
    some = plan(seven, device="cuda", memory="24GiB")["proposal"]
    assert some["fits"]
    assert some["settings"]
    assert "storage" not in some["settings"]
    assert some["peak"] <= 24 * GIB
    little = plan(seven, device="cuda", memory="8GiB")["proposal"]
    assert little["fits"]
    assert little["settings"]["storage"] == "nf4"
    assert len(little["why"]) == len(little["tried"]) - 1
    none = plan(seven, device="cuda", memory="1GiB")["proposal"]
    assert not none["fits"]
    assert "smaller model" in none["why"][0]
    with pytest.raises(SpecError, match="24GiB"):
        plan(seven, memory="lots")


def test_the_public_name(seven):
    found = rankwise.plan(seven, method="qlora", device="cuda")
    parts = ("weights", "adapters", "gradients", "optimiser", "activations", "working", "process")
    assert found["memory"]["peak"] == sum(found["memory"][part] for part in parts)
    assert [one["name"] for one in found["methods"]][:3] == ["full, float32", "full, 16 bit", "LoRA"]
    assert found["with_checkpointing"] < found["without_checkpointing"]
    assert found["inference"]["peak"] < found["memory"]["peak"]
    json.dumps(found)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        plan(tmp_path / "none")
    with pytest.raises(ModelError, match="not a config that can be read"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected a table of settings, found list"):
        plan(tmp_path)
    with pytest.raises(SpecError, match="not trained themselves"):
        memory(method="full", storage="nf4")
