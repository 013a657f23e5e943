"""PEFT's folders, both ways, against PEFT itself."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rankwise.adapters.selection import is_called
from rankwise.adapters.spec import LoraSpec
from rankwise.errors import AdapterFileError, AdapterMismatchError, RankwiseWarning
from rankwise.formats.peft import read_adapter
from rankwise.surgery.bank import Bank
from rankwise.surgery.sites import choose_sites
from tests.grid import relative, spec, trained
from tests.models import ARCHITECTURES, output, tiny

CASES = {
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "llama-all": {"target_modules": "all-linear"},
    "llama-rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "llama-patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 5},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 7},
    },
    "llama-regex": {"target_modules": r".*layers\.1\..*(up|gate)_proj"},
    "llama-fewer": {"target_modules": ["q_proj", "down_proj", "lm_head"], "layers_to_transform": 1},
    "qwen3-fewer": {"target_modules": "all-linear", "exclude_modules": [".*", "k_proj", "layers.0.mlp.up_proj"]},
    "gpt2-fewer": {"target_modules": ["c_attn", "c_fc"], "exclude_modules": r".*\.0\..*", "fan_in_fan_out": True},
    "t5-decoder": {"target_modules": ["q", "wo"], "layers_to_transform": [0, 1], "layers_pattern": ["decoder.block"]},
    "bart-fewer": {"target_modules": ["v_proj", "fc2"], "layers_to_transform": [0], "exclude_modules": r"model\.enc.*"},
    "llama-whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "llama-embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "gemma3-embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "qwen3": {"target_modules": ["o_proj", "gate_proj"], "init_lora_weights": "gaussian"},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "gpt-neox": {"target_modules": ["query_key_value"]},
    "phi3": {"target_modules": ["qkv_proj"]},
    "t5": {"target_modules": ["q", "wo"]},
    "bart": {"target_modules": ["v_proj", "fc2"]},
    "bert": {"target_modules": ["query"]},
    "roberta-whole": {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    "vit": {"target_modules": ["q_proj", "projection"]},
    "unet": {"target_modules": ["down", "to_q", "up", "line", "volume"]},
    "llama-dora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "llama-lookup": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "gpt2-dora": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    "bert-dora": {"target_modules": ["query", "dense"], "use_dora": True},
    "unet-dora": {"target_modules": ["down", "to_q", "up", "line", "volume"], "use_dora": True},
}
ALL = pytest.mark.parametrize("case", CASES)


def model_of(case: str):
    name = case if case in ARCHITECTURES else case.rsplit("-", 1)[0]
    return tiny(name), ARCHITECTURES[name].inputs(3)


def peft_model(case: str):
    model, inputs = model_of(case)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, **CASES[case]})
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return wrapped, inputs


def exactly(wrapped, inputs):
    """PEFT's answer in float64: in float32 its own rounding may exceed what is allowed here."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return output(wrapped.double(), inputs).float()


@ALL
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_what_peft_saves_does_the_same_here(case, tmp_path):
    wrapped, inputs = peft_model(case)
    wrapped.save_pretrained(tmp_path)
    want = exactly(wrapped, inputs)
    model, _ = model_of(case)
    bank = Bank(model)
    bank.load("theirs", tmp_path)
    with bank.use("theirs"):
        got = output(model, inputs)
    assert relative(want, output(model, inputs)) > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@ALL
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_what_is_saved_here_does_the_same_in_peft(case, tmp_path):
    wrapped, _ = peft_model(case)
    wrapped.save_pretrained(tmp_path / "theirs")
    model, inputs = model_of(case)
    bank = Bank(model)
    bank.load("a", tmp_path / "theirs")
    with bank.use("a"):
        want = output(model, inputs)
    bank.save("a", tmp_path / "ours")
    clean, _ = model_of(case)
    got = exactly(peft.PeftModel.from_pretrained(clean, tmp_path / "ours").eval(), inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@ALL
@pytest.mark.filterwarnings("ignore")
def test_the_spec_that_is_read_means_the_layers_that_there_are(case, tmp_path):
    peft_model(case)[0].save_pretrained(tmp_path)
    bank = Bank(model_of(case)[0])
    bank.load("theirs", tmp_path)
    found = bank.adapter("theirs")
    spec = found.spec.model_copy(update={"exclude": _of_the_model(bank, found.spec.exclude)})
    assert [site.path for site in choose_sites(spec, bank.sites, tuple(bank.modules))] == list(found.sites)


def _of_the_model(bank: Bank, exclude):
    """PEFT lets a name stand that means nothing."""
    return exclude if isinstance(exclude, str) else tuple(n for n in exclude if is_called(n, bank.modules))


@pytest.mark.parametrize(
    ("case", "targets", "exclude", "layers"),
    [
        ("llama-fewer", ("down_proj", "lm_head", "q_proj"), (), "1"),
        ("gpt2-fewer", ("c_attn", "c_fc"), r".*\.0\..*", ""),
        ("bart-fewer", ("fc2", "v_proj"), r"model\.enc.*", "0"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_was_left_out_is_read_as_it_was_said(case, targets, exclude, layers, tmp_path):
    peft_model(case)[0].save_pretrained(tmp_path)
    spec = read_adapter(tmp_path).spec
    assert (spec.targets, spec.exclude, spec.layers) == (targets, exclude, layers)


@pytest.mark.filterwarnings("ignore")
def test_one_stack_of_several_is_read_as_its_layers_by_name(tmp_path):
    peft_model("t5-decoder")[0].save_pretrained(tmp_path)
    spec = read_adapter(tmp_path).spec
    assert (spec.exclude, spec.layers) == ((), "")
    assert len(spec.targets) == 6
    assert all(path.startswith("decoder.block.") for path in spec.targets)


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)", "alpha"])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_every_scaling_and_pattern_survives_the_journey(scaling, tmp_path):
    model, inputs = model_of("llama")
    chosen = LoraSpec(
        rank=6,
        alpha=5,
        scaling=scaling,
        targets=("q_proj", "up_proj"),
        rank_pattern={"layers.1.*": 3, "up_proj": 7},
        alpha_pattern={"layers.0.mlp.up_proj": 2.5},
    )
    bank = Bank(model)
    trained(bank, "a", chosen)
    with bank.use("a"):
        want = output(model, inputs)
    bank.save("a", tmp_path)
    clean, _ = model_of("llama")
    theirs = peft.PeftModel.from_pretrained(clean, tmp_path).eval()
    torch.testing.assert_close(output(theirs, inputs), want, rtol=1e-5, atol=1e-5)
    bank.load("b", tmp_path)
    for path, factors in bank.adapter("a").sites.items():
        again = bank.adapter("b").sites[path]
        assert (again.rank, again.shape) == (factors.rank, factors.shape)
        torch.testing.assert_close(again.delta(), factors.delta(), rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", ["^0", "1.0"])
def test_a_written_pattern_means_one_site_even_where_its_path_ends_another(pattern, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)), torch.randn(3, 4)
    clean = copy.deepcopy(model)
    bank = Bank(model)
    trained(bank, "a", spec(("0", "1.0", "2"), rank_pattern={pattern: 2}, alpha_pattern={pattern: 9}))
    with bank.use("a"):
        want = model(x)
    bank.save("a", tmp_path)
    bank.load("b", tmp_path)
    assert bank.adapter("b").digest() == bank.adapter("a").digest()
    theirs = peft.PeftModel.from_pretrained(clean, tmp_path).eval()
    torch.testing.assert_close(theirs(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_head_trained_whole_does_not_make_another_base(tmp_path):
    model, other = tiny("roberta"), tiny("roberta")
    with torch.no_grad():
        for parameter in other.classifier.parameters():
            parameter += 1
    bank = Bank(model)
    trained(bank, "a", spec("minimal", modules_to_save=("classifier",)))
    bank.save("a", tmp_path / "a")
    trained(bank, "plain", spec("minimal"))
    bank.save("plain", tmp_path / "plain")
    bank = Bank(other)
    bank.load("a", tmp_path / "a")
    with pytest.raises(AdapterMismatchError, match="fingerprint"):
        bank.load("plain", tmp_path / "plain")
    with torch.no_grad():
        third = tiny("roberta")
        third.roberta.embeddings.word_embeddings.weight += 1
    with pytest.raises(AdapterMismatchError, match="fingerprint"):
        Bank(third).load("a", tmp_path / "a")


@pytest.fixture
def folder(tmp_path):
    bank = Bank(tiny("llama"))
    trained(bank, "a", spec("attention"))
    bank.save("a", tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)


def reconfigure(folder, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_one_renamed_key_is_an_error_that_names_it(folder):
    rewrite(
        folder,
        lambda tensors: {k.replace("layers.0.self_attn.q", "layers.9.self_attn.q"): v for k, v in tensors.items()},
    )
    with pytest.raises(AdapterMismatchError, match=r"1 of its 8 parts.*\n.*layers.9.self_attn.q_proj: no such layer"):
        Bank(tiny("llama")).load("a", folder)


def test_another_prefix_is_an_error_that_lists_every_key(folder):
    rewrite(
        folder,
        lambda tensors: {k.replace("model.model.model.", "model.model.language_model."): v for k, v in tensors.items()},
    )
    with pytest.raises(AdapterMismatchError, match="8 of its 8 parts") as caught:
        Bank(tiny("llama")).load("a", folder)
    assert str(caught.value).count("no such layer") == 8


def test_one_missing_one_transposed_and_one_strange_tensor_are_all_told(folder):
    def change(tensors):
        stem = "base_model.model.model.layers.0.self_attn."
        del tensors[f"{stem}q_proj.lora_A.weight"]
        tensors[f"{stem}k_proj.lora_A.weight"] = tensors[f"{stem}k_proj.lora_A.weight"].t().contiguous()
        tensors[f"{stem}v_proj.lora_magnitude_vector"] = torch.ones(3)
        return tensors

    rewrite(folder, change)
    with pytest.raises(AdapterFileError) as caught:
        Bank(tiny("llama")).load("a", folder)
    for piece in ("q_proj: has B only", "k_proj: A has rank 32", "has magnitudes, but use_dora is not set"):
        assert piece in str(caught.value)


def test_a_rank_that_contradicts_the_config_is_an_error(folder):
    reconfigure(folder, r=5)
    with pytest.raises(AdapterFileError, match="rank 3 in the tensors, 5 in the config"):
        Bank(tiny("llama")).load("a", folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_qalora": True}, "use_qalora = True"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"use_newest_trick": True}, "use_newest_trick = True: not known here"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_settings_that_change_the_result_and_are_not_known_are_errors(folder, settings, says):
    reconfigure(folder, **settings)
    with pytest.raises(AdapterFileError, match=r"cannot be honoured") as caught:
        Bank(tiny("llama")).load("a", folder)
    assert says in str(caught.value)


def test_settings_that_change_nothing_are_ignored_and_nothing_is_imported(folder):
    reconfigure(
        folder, auto_mapping={"parent_library": "no_such_library_x"}, megatron_core="no_such_library_y", newest=None
    )
    Bank(tiny("llama")).load("a", folder)


def test_an_adapter_that_changes_nothing_loads_with_a_warning(folder):
    rewrite(folder, lambda tensors: {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()})
    with pytest.warns(RankwiseWarning, match="changes nothing"):
        Bank(tiny("llama")).load("a", folder)


def test_the_base_is_recognised_in_any_number_format_and_others_are_refused(folder):
    Bank(tiny("llama", torch.bfloat16)).load("a", folder)
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 0.5
    with pytest.raises(AdapterMismatchError, match="fingerprint"):
        Bank(other).load("a", folder)
    Bank(other).load("a", folder, force=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_neither_read_nor_written(folder, tmp_path, value):
    bank = Bank(tiny("llama"))
    bank.load("a", folder)
    with torch.no_grad():
        next(iter(bank.adapter("a").sites.values())).A[0, 0] = value
    with pytest.raises(AdapterFileError, match="not finite"):
        bank.save("a", tmp_path / "new")
    assert not (tmp_path / "new" / "adapter_model.safetensors").exists()
    rewrite(folder, lambda tensors: {k: v * value for k, v in tensors.items()})
    with pytest.raises(AdapterFileError, match="not finite"):
        Bank(tiny("llama")).load("a", folder)


def test_a_frozen_embedding_stored_along_must_be_the_base_own(tmp_path):
    wrapped, _ = peft_model("llama-embedding")
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    rewrite(tmp_path, lambda tensors: {k: v + 1 if "base_layer" in k else v for k, v in tensors.items()})
    with pytest.raises(AdapterMismatchError, match="its values are others"):
        Bank(tiny("llama")).load("a", tmp_path)


@torch.no_grad()
def test_magnitudes_and_the_word_for_them_go_together(tmp_path):
    bank = Bank(tiny("llama"))
    for form in ("lora", "dora"):
        trained(bank, form, spec(("q_proj",), form=form))
        bank.save(form, tmp_path / form)
    for form, says in (("lora", "has A, B only, of A and B and m"), ("dora", "use_dora is not set")):
        path = tmp_path / form / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": form == "lora"}))
        with pytest.raises(AdapterFileError, match=says):
            bank.load("again", tmp_path / form)


@torch.no_grad()
def test_a_dora_that_changes_nothing_says_so_and_one_whose_magnitudes_do_does_not(tmp_path, recwarn):
    bank = Bank(tiny("llama"))
    bank.add("fresh", spec(("q_proj",), form="dora"))
    bank.save("fresh", tmp_path / "fresh")
    with pytest.warns(RankwiseWarning, match="changes nothing"):
        bank.load("one", tmp_path / "fresh")
    for factors in bank.adapter("fresh").sites.values():
        factors.m *= 1.5
    bank.save("fresh", tmp_path / "louder")
    recwarn.clear()
    bank.load("other", tmp_path / "louder")
    assert not [w for w in recwarn if issubclass(w.category, RankwiseWarning)]
