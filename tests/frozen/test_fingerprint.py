"""The same weights have one fingerprint however they are held; other weights or another architecture have another."""

import pytest
import torch
from torch import nn

from rankwise.frozen.fingerprint import fingerprint
from rankwise.surgery.bank import Bank
from tests.grid import spec, trained
from tests.models import ARCHITECTURES, tiny


def of(model: nn.Module) -> str:
    return fingerprint(model.named_parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_checkpoint_has_one_fingerprint_in_every_format_that_holds_it(stored):
    want = of(tiny("llama", stored))
    for held in (stored, torch.float32, torch.bfloat16, torch.float64):
        assert of(tiny("llama", stored).to(held)) == want, held


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_weights_near_zero_keep_it_in_float16_too(stored):
    """Below 2⁻¹⁷ float16 has fewer digits than bfloat16, and below 2⁻²⁵ none: some weights of any model lie there."""
    tiny_ones = torch.randn(100, 64) * torch.logspace(-9, 0, 100).unsqueeze(1)
    edges = torch.tensor([2.0**e * (1 + s / 256) for e in range(-26, -12) for s in (-1, 0, 1, 255)])
    for weight in (tiny_ones.to(stored), edges.to(stored)):
        found = {fingerprint([("w", weight.to(held))]) for held in (torch.float32, torch.bfloat16, torch.float16)}
        assert len(found) == 1


def test_a_value_that_is_not_a_number_is_seen():
    weight = torch.ones(64)
    clean = fingerprint([("w", weight)])
    weight[5] = torch.nan
    assert fingerprint([("w", weight)]) not in (clean, fingerprint([("w", weight.nan_to_num(0.0))]))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "unet", "t5"])
def test_a_change_to_any_one_parameter_is_seen(name):
    model = tiny(name)
    seen = {of(model)}
    for path, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(0.1)
        assert of(model) not in seen, path
        seen.add(of(model))


@pytest.mark.parametrize("size", [1, 63, 64, 65, 96, 127, 128, 1000, 4097])
def test_values_are_looked_at_from_the_first_to_the_last(size):
    """64 at the most, evenly spread: no stretch longer than one step goes unseen."""
    weight = torch.zeros(size)
    clean, step = fingerprint([("w", weight)]), -(-size // 64)
    for start in range(0, size, step):
        changed = weight.clone()
        changed[start : start + step] = 1.0
        assert fingerprint([("w", changed)]) != clean, start


def test_names_and_shapes_count_and_the_order_does_not():
    pair = [("a", torch.ones(2, 8)), ("b", torch.zeros(4, 4))]
    want = fingerprint(pair)
    assert fingerprint(reversed(pair)) == want
    assert fingerprint([("a", torch.ones(8, 2)), pair[1]]) != want
    assert fingerprint([("c", torch.ones(2, 8)), pair[1]]) != want
    assert fingerprint([("a", pair[1][1]), ("b", pair[0][1])]) != want
    assert fingerprint(pair[:1]) != want


def test_a_weight_is_read_as_it_stands_whatever_its_place_in_memory():
    weight = torch.randn(12, 7)
    turned = weight.t().contiguous().t()
    assert fingerprint([("w", turned)]) == fingerprint([("w", weight)])
    assert fingerprint([("w", weight.t())]) != fingerprint([("w", weight)])


def test_architectures_differ_wherever_their_parameters_do():
    """Llama, Mistral and Granite have the same ones: there the weights alone must tell, and a seed makes them equal."""
    models = {name: tiny(name) for name in ARCHITECTURES}
    shapes = {name: tuple((path, p.shape) for path, p in model.named_parameters()) for name, model in models.items()}
    found = {name: of(model) for name, model in models.items()}
    assert len(set(found.values())) == len(set(shapes.values())) > 15


def test_tied_weights_are_one_weight_and_untying_them_shows():
    tied, untied = tiny("llama-tied"), tiny("llama-tied")
    untied.lm_head.weight = nn.Parameter(untied.model.embed_tokens.weight.detach().clone())
    assert of(tied) == of(tiny("llama-tied"))
    assert of(tied) != of(untied)


def test_adapters_do_not_show_in_the_fingerprint_of_the_base():
    model = tiny("llama-tied")
    clean = of(model)
    with Bank(model) as bank:
        trained(bank, "a", spec("all-linear"))
        trained(bank, "b", spec(("lm_head",)))
        assert bank.base_fingerprint == clean
        bank.merge("a")
        assert bank.base_fingerprint == clean
    assert of(model) == clean


def test_gradients_and_frozen_flags_do_not_show():
    model = tiny("llama")
    clean = of(model)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert of(model.requires_grad_(False)) == clean
