"""ΔW, weight by weight, against PEFT's own: read from its folders, written for it, and merged by both."""

import peft
import pytest
import torch
from torch import Tensor, nn

from rankwise.surgery.bank import Bank
from tests.formats.test_adalora import SCHEDULE
from tests.formats.test_peft import CASES, exactly, model_of, peft_model
from tests.grid import RESIDUAL_FORMS, RESIDUAL_STARTS, relative, spec, trained
from tests.models import ARCHITECTURES, every_site, output, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's
DORA = [case for case in CASES if CASES[case].get("use_dora")]
PLAIN = [case for case in CASES if case not in DORA]


def adapted(wrapped: nn.Module) -> dict[str, nn.Module]:
    """PEFT's adapted layers by the path that they have in the model."""
    layers = {path: m for path, m in wrapped.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)}
    return {path.removeprefix("base_model.model."): m for path, m in layers.items() if hasattr(m, "get_delta_weight")}


def stored_as(bank: Bank, path: str, weight: Tensor) -> Tensor:
    return bank.sites[path].kind.oriented(weight)


def check_deltas(bank: Bank, name: str, wrapped: nn.Module) -> None:
    layers, sites = adapted(wrapped), bank.adapter(name).sites
    assert layers.keys() == sites.keys()
    for path, layer in layers.items():
        assert relative(stored_as(bank, path, sites[path].delta()), layer.get_delta_weight("default")) < 1e-6, path


@torch.no_grad()
@pytest.mark.parametrize("case", PLAIN)
def test_a_change_is_pefts_own_both_ways(case, tmp_path):
    wrapped, _ = peft_model(case)
    wrapped.save_pretrained(tmp_path / "theirs")
    with Bank(model_of(case)[0]) as bank:
        bank.load("a", tmp_path / "theirs")
        check_deltas(bank, "a", wrapped)
        bank.save("a", tmp_path / "ours")
        check_deltas(bank, "a", peft.PeftModel.from_pretrained(model_of(case)[0], tmp_path / "ours"))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_merged_weight_is_the_one_that_peft_merges(case, tmp_path):
    """Of a DoRA this is all that PEFT has: it knows no ΔW of it."""
    wrapped, _ = peft_model(case)
    wrapped.save_pretrained(tmp_path)
    with Bank(model_of(case)[0]) as bank:
        bank.load("a", tmp_path)
        merged = wrapped.merge_and_unload()
        bank.merge("a")
        for path in bank.adapter("a").sites:
            assert relative(bank.model.get_submodule(path).weight, merged.get_submodule(path).weight) < 1e-6, path


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adalora_is_pefts_own(name, tmp_path):
    targets, across = list(ARCHITECTURES[name].targets[:2]), name == "gpt2"
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=7, target_modules=targets, fan_in_fan_out=across, **SCHEDULE
    )
    wrapped = peft.get_peft_model(tiny(name), config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * torch.randn(parameter.shape)
    wrapped.save_pretrained(tmp_path)
    with Bank(tiny(name)) as bank:
        bank.load("a", tmp_path)
        check_deltas(bank, "a", wrapped)


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)", "alpha"])
def test_every_kind_of_site_of_an_adalora_of_ours_is_read_by_peft(scaling, tmp_path):
    with Bank(every_site()) as bank:
        trained(bank, "a", spec(".*", form="adalora", scaling=scaling))
        bank.save("a", tmp_path)
        check_deltas(bank, "a", peft.PeftModel.from_pretrained(every_site(), tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("start", RESIDUAL_STARTS)
@pytest.mark.parametrize("form", RESIDUAL_FORMS)
def test_peft_reads_what_began_from_the_weight_on_the_base_as_it_is(name, start, form, tmp_path):
    model, inputs = tiny(name), ARCHITECTURES[name].inputs(3)
    with Bank(model) as bank:
        chosen = spec(ARCHITECTURES[name].targets, form=form, init=start, rank=2, scaling="alpha/sqrt(r)")
        trained(bank, "a", chosen, size=0.1)
        with bank.use("a"):
            want = output(model, inputs)
        assert relative(output(model, inputs), want) > 0.01
        bank.save("a", tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path).eval()
        if form == "lora":
            check_deltas(bank, "a", theirs)
        assert relative(exactly(theirs, inputs), want) < 1e-5
