"""Adapters in a weighted sum, for one request: y = base + Σ weight · ΔW x, on every kind of layer and in any route."""

import pytest
import torch

from rankwise.adapters.combining import combine
from rankwise.adapters.recipe import Recipe
from rankwise.errors import BankError, RouteError
from rankwise.frozen.coded import hold
from rankwise.surgery.bank import Bank
from rankwise.surgery.routing import Mix
from tests.grid import STORAGES, relative, spec, state_of, trained
from tests.models import ARCHITECTURES, every_site, output, tiny, words

WEIGHTS = {"a": 0.7, "b": -0.3}


def held(model, targets="all-linear") -> Bank:
    """Two forms, ranks and scales; each alone somewhere."""
    bank = Bank(model)
    trained(bank, "a", spec(targets))
    trained(bank, "b", spec(targets, rank=2, alpha=5, form="adalora", scaling="alpha"), seed=5)
    return bank


@torch.no_grad()
def test_each_kind_of_layer_gives_base_and_weighted_changes_in_float64():
    model = every_site(torch.float64)
    with held(model, ("words", "linear", "across", "line", "plane", "volume")) as bank:
        stands = {path: model.get_submodule(path) for path in bank.adapter("a").sites}
        inputs = {}
        hooks = [
            stand.register_forward_hook(lambda stand, x, y: inputs.__setitem__(stand.path, (x[0], y)))
            for stand in stands.values()
        ]
        with bank.use(bank.mix(WEIGHTS)):
            output(model, words(3))
        for hook in hooks:
            hook.remove()
        for path, (x, y) in inputs.items():
            stand = stands[path]
            base = stand.base(x)
            alone = {}
            for name in WEIGHTS:
                with bank.use(name):
                    alone[name] = stand(x) - base
            want = base + sum(weight * alone[name] for name, weight in WEIGHTS.items())
            torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
            assert relative(want, base) > 1e-2
        assert inputs.keys() == stands.keys()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5", "vit", "unet"])
@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_a_mix_is_the_adapter_that_combining_makes_of_it(name, storage):
    architecture = ARCHITECTURES[name]
    model, inputs = hold(tiny(name), storage), architecture.inputs(2)
    before = state_of(model)
    with held(model, architecture.targets) as bank:
        with bank.use(bank.mix(WEIGHTS)):
            mixed = output(model, inputs)
        pair = {name: bank.adapter(name) for name in WEIGHTS}
        bank.put("both", combine(pair, Recipe(weights=tuple(WEIGHTS.values()))).adapter)
        with bank.use("both"):
            assert relative(mixed, output(model, inputs)) < 1e-5
        with bank.use(None):
            assert relative(mixed, output(model, inputs)) > 1e-3
    assert state_of(model) == before


@torch.no_grad()
def test_rows_and_tokens_may_have_mixes_adapters_and_the_bare_base_beside_each_other():
    model, inputs = tiny("llama"), words(4)
    with held(model) as bank:
        ways = [bank.mix(WEIGHTS), None, "a", bank.mix({"b": 2.0})]
        alone = []
        for number, way in enumerate(ways):
            with bank.use(way):
                alone.append(model(input_ids=inputs["input_ids"][number : number + 1]).logits)
        with bank.route(ways):
            torch.testing.assert_close(model(**inputs).logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
        stream = inputs["input_ids"][:1, :9]
        stand = model.model.layers[0].self_attn.q_proj
        with bank.stream([(ways[0], 2), (None, 4), ("a", 3)]):
            x = torch.randn(1, stream.shape[1], 32)
            routed = stand(x)
        for way, span in ((ways[0], slice(0, 2)), (None, slice(2, 6)), ("a", slice(6, 9))):
            with bank.use(way):
                torch.testing.assert_close(routed[:, span], stand(x)[:, span], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_adapter_in_full_is_that_adapter_and_none_of_it_the_base():
    model, inputs = tiny("llama"), words(2)
    with held(model) as bank:
        for weight, way in ((1.0, "a"), (0.0, None)):
            with bank.use(way):
                want = output(model, inputs)
            with bank.use(bank.mix({"a": weight})):
                assert relative(output(model, inputs), want) < 1e-5


def test_a_gradient_comes_to_each_adapter_by_its_weight():
    model, inputs = tiny("llama"), words(2)
    with held(model) as bank:
        B = {name: bank.adapter(name).sites["model.layers.1.mlp.down_proj"].B for name in WEIGHTS}
        gradients = {}
        for name, weight in WEIGHTS.items():
            # To first order in weight, at the point where the mix is: numerically, in one direction.
            with bank.use(bank.mix(WEIGHTS)):
                output(model, inputs).square().sum().backward()
            gradients[name] = B[name].grad.clone()
            for parameter in B.values():
                parameter.grad = None
            step = 1e-3 * gradients[name] / gradients[name].norm()
            values = []
            for sign in (1, -1):
                with torch.no_grad(), bank.use(bank.mix(WEIGHTS)):
                    B[name].add_(sign * step)
                    values.append(float(output(model, inputs).double().square().sum()))
                    B[name].sub_(sign * step)
            assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(gradients[name].norm()), rel=2e-2)
            assert weight


def test_what_is_no_term_of_a_sum_is_refused_with_its_reason():
    with held(tiny("llama")) as bank:
        bank.add("d", spec(("q_proj",), form="dora"))
        with pytest.raises(RouteError, match="d is of form dora"):
            bank.mix({"a": 1, "d": 1})
        bank.remove("a")
        bank.remove("b")
        bank.remove("d")
        bank.add("w", spec(("q_proj",), modules_to_save=("lm_head",)))
        bank.add("t", spec(("v_proj",)))
        with pytest.raises(RouteError, match="w has modules trained whole"), bank.use(Mix.of({"w": 1.0, "t": 1.0})):
            raise AssertionError
        with pytest.raises(BankError, match="no adapter 'x'"):
            bank.mix({"t": 0.5, "x": 0.5})
        for bad in ({}, {"t": float("nan")}):
            with pytest.raises(RouteError, match="finite weights"):
                bank.mix(bad)
        bank.merge("t")
        with pytest.raises(RouteError, match="is merged"), bank.use(bank.mix({"t": 0.5})):
            raise AssertionError


def test_dropout_has_no_place_in_a_mix():
    model = tiny("llama")
    with Bank(model) as bank:
        bank.add("a", spec(("q_proj",), dropout=0.1))
        with bank.use(bank.mix({"a": 0.5})):
            output(model, words(1))
            model.train()
            with pytest.raises(RouteError, match=r"0\.5 · a: has dropout"):
                output(model, words(1))
