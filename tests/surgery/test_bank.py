from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rankwise.adapters.adapter import Adapter
from rankwise.adapters.spec import LoraSpec
from rankwise.errors import AdapterMismatchError, BankError, RouteError, TargetError
from rankwise.formats.peft import task_of
from rankwise.surgery.bank import Bank
from rankwise.surgery.layer import AdaptedLayer
from tests.grid import relative, spec, state_of, trained
from tests.models import ARCHITECTURES, output, tiny, words


def test_the_model_is_untouched_until_the_first_add():
    model = tiny("llama")
    before = state_of(model)
    bank = Bank(model)
    assert bank.sites
    assert bank.base_fingerprint
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["../x", "/etc", "", "a" * 65, "ä", "a b", ".hidden", "a\0", "a/b"])
def test_names_are_names(name):
    with pytest.raises(BankError, match="not an adapter name"):
        Bank(tiny("llama")).add(name, spec())


@pytest.mark.parametrize("name", ["double", "keys", "training", "half.keys", "type.", "T_destination", "pop"])
def test_names_may_be_those_that_modules_have_for_themselves(name, tmp_path):
    model, inputs = tiny("llama"), words(2)
    before = state_of(model)
    with Bank(model) as bank:
        trained(bank, name, spec(("q_proj",), modules_to_save=("lm_head",)))
        trained(bank, f"{name}.", spec(("q_proj",)), seed=1)
        with bank.use(name):
            want = output(model, inputs)
        bank.save(name, tmp_path)
        bank.load("other", tmp_path)
        with bank.use("other"):
            assert torch.equal(output(model, inputs), want)
        with bank.use(f"{name}."):
            assert relative(output(model, inputs), want) > 1e-2
    assert state_of(model) == before


def test_names_are_compared_whole():
    model = tiny("llama")
    with Bank(model) as bank:
        for number, name in enumerate(("foo", "foobar", "mlp", "foo.bar", "foo-bar", "q_proj", "base", "weight")):
            trained(bank, name, spec("minimal"), seed=number)
        digests = {name: bank.adapter(name).digest() for name in bank.names}
        assert len(set(digests.values())) == len(digests)
        bank.remove("foo")
        del digests["foo"]
        assert {name: bank.adapter(name).digest() for name in bank.names} == digests
        with pytest.raises(BankError, match="did you mean"):
            bank.use("foobarr")


def test_two_banks_cannot_hold_one_model():
    model = tiny("llama")
    with Bank(model) as bank:
        bank.add("a", spec())
        with pytest.raises(BankError, match="already held"):
            Bank(model)
    Bank(model)


def test_a_taken_name_is_refused_and_nothing_changes():
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec())
        before = bank.adapter("a").digest()
        with pytest.raises(BankError, match="already holds"):
            bank.add("a", spec())
        assert bank.adapter("a").digest() == before


def test_a_base_frozen_by_its_owner_stays_so():
    model = tiny("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    bank = Bank(model)
    bank.add("a", spec("minimal"))
    base = {id(p) for n, p in model.named_parameters() if "adapters" not in n}
    assert not any(p.requires_grad for p in model.parameters() if id(p) in base)
    bank.close()
    assert [p.requires_grad for p in model.parameters()] == flags


def test_targets_that_match_nothing_are_all_listed():
    with pytest.raises(TargetError) as caught:
        Bank(tiny("llama")).add("a", LoraSpec(targets=("q_prj", "v_proj", "self_attn"), rank_pattern={"k_proj": 2}))
    text = str(caught.value)
    for piece in ("did you mean 'q_proj'", "'self_attn' is a module that cannot be adapted", "rank_pattern 'k_proj'"):
        assert piece in text
    assert "up_proj" in caught.value.hint


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        ("minimal", {"q_proj", "v_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (r".*layers\.1\..*_proj", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (("lm_head", "layers.0.mlp.up_proj"), {"lm_head", "up_proj"}),
    ],
)
def test_targets_by_preset_name_and_regex(targets, leaves):
    with Bank(tiny("llama")) as bank:
        bank.add("a", LoraSpec(targets=targets))
        sites = bank.adapter("a").sites
        assert {path.rsplit(".", 1)[-1] for path in sites} == leaves
        if isinstance(targets, str) and "layers" in targets:
            assert all(".1." in path for path in sites)


def test_patterns_reach_the_factors():
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec("attention", rank_pattern={"layers.1.self_attn.q_proj": 1}, alpha_pattern={"v_proj": 9}))
        sites = bank.adapter("a").sites
        assert sites["model.layers.1.self_attn.q_proj"].rank == 1
        assert sites["model.layers.1.self_attn.q_proj"].scale == 6
        assert sites["model.layers.0.self_attn.q_proj"].rank == 3
        assert sites["model.layers.0.self_attn.v_proj"].scale == 3


def test_a_site_starts_alike_whatever_else_is_targeted():
    with Bank(tiny("llama")) as bank:
        bank.add("few", spec("minimal"), seed=4)
        bank.add("many", spec("all-linear"), seed=4)
        few, many = bank.adapter("few").sites, bank.adapter("many").sites
        assert all(torch.equal(few[path].A, many[path].A) for path in few)


def test_grouped_convolutions_and_bypassed_projections_are_refused():
    model = nn.ModuleDict({"grouped": nn.Conv2d(4, 4, 3, groups=2), "attention": nn.MultiheadAttention(8, 2)})
    for target in ("grouped", "out_proj"):
        with pytest.raises(TargetError, match="cannot be adapted"):
            Bank(model).add("a", spec((target,)))


def test_dropout_acts_in_training_only_and_its_mask_follows_the_tick():
    model = tiny("llama")
    inputs = words(2)
    with Bank(model) as bank, torch.no_grad():
        trained(bank, "a", spec("minimal", dropout=0.5))
        with bank.use("a"):
            calm = [output(model, inputs) for _ in range(2)]
        model.train()
        drawn = []
        for tick in (1, 1, 2):
            with bank.stream([("a", inputs["input_ids"].numel())], tick=tick):
                drawn.append(output(model, inputs))
        assert torch.equal(*calm)
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], calm[0])


def test_while_merged_only_the_merged_adapter_can_be_routed():
    model = tiny("llama")
    with Bank(model) as bank:
        trained(bank, "a", spec(), seed=1)
        trained(bank, "b", spec(), seed=2)
        bank.merge("a")
        with bank.use("a"):
            pass
        with pytest.raises(RouteError, match="merged"), bank.use("b"):
            pass
        for refused in (lambda: bank.merge("b"), lambda: bank.remove("b"), lambda: bank.add("c", spec())):
            with pytest.raises(BankError, match="merged"):
                refused()


def test_a_route_that_does_not_fit_the_batch_says_so():
    model = tiny("llama")
    with Bank(model) as bank:
        trained(bank, "a", spec())
        with bank.route(["a", None]), pytest.raises(RouteError, match="2 rows"):
            output(model, words(3))


@torch.no_grad()
def test_tied_weights_come_apart_in_a_merge_and_together_again_after():
    model = tiny("llama-tied")
    inputs = words(2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with Bank(model) as bank:
        trained(bank, "head", spec(("lm_head",)))
        with bank.use("head"):
            want = output(model, inputs)
        bank.merge("head")
        assert relative(output(model, inputs), want) < 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-tied", "llama", "gpt2"])
def test_a_baked_model_is_ordinary_and_survives_a_reload(name, tmp_path):
    model = tiny(name)
    inputs = words(2)
    bank = Bank(model)
    trained(bank, "a", spec(("lm_head",), modules_to_save=("norm",) if "llama" in name else ("ln_f",)))
    trained(bank, "b", spec("minimal"))
    with bank.use("a"):
        want = output(model, inputs)
    bank.bake("a")
    assert not any("adapters" in path or "base" in path for path, _ in model.named_modules())
    assert relative(output(model, inputs), want) < 1e-5
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert relative(output(again, inputs), want) < 1e-5


def test_modules_trained_whole_are_routed_and_leave_the_base_alone():
    model = tiny("roberta")
    inputs = ARCHITECTURES["roberta"].inputs(3)
    before = state_of(model)
    with Bank(model) as bank:
        trained(bank, "a", spec("minimal", modules_to_save=("classifier",)), seed=1)
        trained(bank, "b", spec("minimal", modules_to_save=("classifier",)), seed=2)
        alone = {}
        for name in ("a", None, "b"):
            with bank.use(name):
                alone[name] = output(model, inputs)
        with bank.route(["a", None, "b"]):
            together = output(model, inputs)
        for row, name in enumerate(("a", None, "b")):
            assert relative(together[row], alone[name][row]) < 1e-5
        bank.merge("a")
        assert relative(output(model, inputs), alone["a"]) < 1e-5
    assert state_of(model) == before


def test_a_module_trained_whole_cannot_hold_a_targeted_site():
    with Bank(tiny("llama")) as bank:
        with pytest.raises(TargetError, match="holds targeted"):
            bank.add("a", spec(("q_proj",), modules_to_save=("self_attn",)))
        bank.add("b", spec(("lm_head",)))
        with pytest.raises(BankError, match="separate banks"):
            bank.add("c", spec("minimal", modules_to_save=("lm_head",)))


def test_an_adapter_for_another_size_lists_what_does_not_fit():
    with Bank(tiny("llama")) as bank, Bank(tiny("phi3")) as other:
        trained(bank, "a", spec("all-linear"))
        with pytest.raises(AdapterMismatchError) as caught:
            other.put("a", bank.adapter("a"))
    assert "q_proj: no such layer" in str(caught.value)
    assert "10 of its 14 parts" in str(caught.value)


def test_autocast_goes_through_the_fused_product():
    model = tiny("llama")
    with Bank(model) as bank:
        trained(bank, "a", spec("minimal"))
        with bank.use("a"):
            want = output(model, words(2))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = output(model, words(2))
            got.float().sum().backward()
    assert relative(got.detach(), want.detach()) < 0.05


def test_a_hook_on_a_layer_is_still_called():
    model = tiny("llama")
    layer, calls = model.model.layers[0].self_attn.q_proj, []
    layer.register_forward_hook(lambda module, inputs, out: calls.append(out.shape))
    with Bank(model) as bank, torch.no_grad():
        trained(bank, "a", spec("minimal"))
        with bank.use("a"):
            hooked = output(model, words(2))
        assert len(calls) == 1
        layer._forward_hooks.clear()
        with bank.use("a"):
            assert relative(hooked, output(model, words(2))) < 1e-5


def test_a_loaded_adapter_is_the_saved_one_in_the_same_order(tmp_path):
    with Bank(tiny("llama")) as bank:
        trained(bank, "made", spec("all-linear"))
        bank.save("made", tmp_path)
        bank.load("read", tmp_path)
        made, read = bank.adapter("made"), bank.adapter("read")
        assert list(read.sites) == list(made.sites)
        assert read.digest() == made.digest()
        turned = Adapter(made.spec, dict(reversed(made.sites.items())), made.modules)
        assert turned.digest() == made.digest()


@pytest.mark.parametrize("first", [True, False])
def test_an_adding_that_fails_halfway_changes_nothing(first, monkeypatch):
    model = tiny("llama")
    bank = Bank(model)
    if not first:
        trained(bank, "held", spec("minimal"))
    before, calls, real = state_of(model), [], AdaptedLayer.admit

    def failing(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(AdaptedLayer, "admit", failing)
    with pytest.raises(KeyboardInterrupt):
        bank.add("a", spec("attention"))
    assert state_of(model) == before
    assert bank.names == (() if first else ("held",))
    monkeypatch.undo()
    bank.add("a", spec("attention"))


def test_baking_gives_back_the_flags_and_forgets_the_old_base():
    model = tiny("llama-tied")
    model.model.norm.weight.requires_grad_(False)
    names = {path for path, _ in model.named_parameters()} | {"lm_head.weight"}
    bank = Bank(model)
    trained(bank, "a", spec(("lm_head", "q_proj")))
    old = bank.base_fingerprint
    bank.bake("a")
    flags = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    assert flags == {path: path != "model.norm.weight" for path in names}
    assert bank.base_fingerprint != old
    assert all(site.module is model.get_submodule(path) for path, site in bank.sites.items())


@pytest.mark.parametrize(("encoder_decoder", "task"), [(True, "SEQ_2_SEQ_LM"), (False, "CAUSAL_LM")])
def test_the_task_of_a_conditional_model_follows_its_config(encoder_decoder, task):
    class SomeForConditionalGeneration(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=encoder_decoder)

    assert task_of(SomeForConditionalGeneration()) == task
