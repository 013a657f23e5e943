"""Values and gradients of every form at every kind of site against float64 autograd of the form's formula."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.lowrank import LowRank
from rankwise.adapters.spec import LoraSpec
from rankwise.surgery.bank import Bank
from tests.grid import FORMS, RESIDUAL_FORMS, RESIDUAL_STARTS, relative, spec, trained
from tests.models import ARCHITECTURES, every_site, output, tiny, words

STARTS = [(form, "kaiming") for form in FORMS] + [(form, start) for form in RESIDUAL_FORMS for start in RESIDUAL_STARTS]
EVERY = pytest.mark.parametrize(("form", "start"), STARTS)


def low_rank(own: LowRank, B: Tensor) -> Tensor:
    """s·B·A, less s·B₀·A₀ where a start is taken off again."""
    product = B.flatten(1) @ own.A.flatten(1)
    return own.scale * (product if own.A0 is None else product - own.B0.flatten(1) @ own.A0.flatten(1))


def dora(weight: Tensor, own: LowRank) -> Tensor:
    """Equation 5 of arXiv:2402.09353, with the norm held constant (§4.3)."""
    direction = weight + low_rank(own, own.B)
    return direction * (own.m / direction.detach().norm(dim=1))[:, None]


# What W `[O, ...]` becomes.
FORMULAS: dict[str, Callable[[Tensor, LowRank], Tensor]] = {
    "lora": lambda weight, own: weight + low_rank(own, own.B),
    "dora": dora,
    "adalora": lambda weight, own: weight + low_rank(own, own.B.flatten(1) * own.lam),
}


def becomes(form: str, layer: nn.Module, own: LowRank) -> Tensor:
    """A layer's weight as it stores it, under an adapter."""
    turned = isinstance(layer, Conv1D | nn.Embedding)  # [I, O]
    weight = layer.weight.detach().t() if turned else layer.weight.detach()
    changed = FORMULAS[form](weight.flatten(1), own).view(weight.shape)
    return changed.t() if turned else changed


def against_the_formula(
    model: nn.Module, chosen: LoraSpec, call: Callable[[Callable], Tensor], *leaves: Tensor
) -> None:
    """Of a model in float64: `call` makes an output of it, or of what stands for it; `leaves` have a gradient too."""
    clean = copy.deepcopy(model.requires_grad_(False))
    with Bank(model) as bank:
        trained(bank, "task", chosen)
        sites = bank.adapter("task").sites
        for own in sites.values():
            own.double()
        parameters = dict(bank.named_parameters("task"))
        with bank.use("task"):
            got = call(model)
        changed = {}
        for path, own in sites.items():
            weight = becomes(chosen.form, clean.get_submodule(path), own)
            changed |= {f"{place}.weight": weight for place in (path, *bank.sites[path].aliases)}
        want = call(lambda *inputs, **named: functional_call(clean, changed, inputs, named, tie_weights=False))
    assert relative(got, want) < 1e-8
    loss = torch.randn(want.shape, dtype=torch.float64)  # without symmetries: no gradient cancels
    names = [*(f"input {i}" for i in range(len(leaves))), *parameters]
    found, true = (torch.autograd.grad(out, [*leaves, *parameters.values()], loss) for out in (got, want))
    for name, a, b in zip(names, found, true, strict=True):
        assert b.norm() > 0, name
        assert relative(a, b) < 1e-8, name


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 7),
    "without a bias": lambda: nn.Linear(5, 7, bias=False),
    "transformers' Conv1D": lambda: Conv1D(7, 5),
    "line": lambda: nn.Conv1d(5, 4, 3, padding="same", padding_mode="reflect"),
    "line, strided": lambda: nn.Conv1d(5, 4, 3, stride=2, padding=1, bias=False),
    "plane": lambda: nn.Conv2d(5, 4, (3, 2), padding=(2, 1), padding_mode="circular"),
    "plane, dilated": lambda: nn.Conv2d(5, 4, 3, dilation=(1, 2), padding=2),
    "plane, one by one": lambda: nn.Conv2d(5, 4, 1),
    "volume": lambda: nn.Conv3d(5, 4, (1, 2, 3), stride=(1, 2, 1), padding=1),
    "embedding": lambda: nn.Embedding(9, 6),
    "Gemma's embedding": lambda: Gemma3TextScaledWordEmbedding(9, 6, padding_idx=8, embed_scale=3.7),
}
EXTENTS = {nn.Conv1d: (8,), nn.Conv2d: (6, 7), nn.Conv3d: (3, 5, 4)}


@pytest.mark.parametrize("layer", LAYERS)
@EVERY
def test_a_layer_of_every_kind(layer, form, start):
    model = nn.Sequential(LAYERS[layer]()).double()
    chosen = spec(("0",), form=form, init=start)
    if isinstance(model[0], nn.Embedding):
        x = torch.randint(8, (3, 4))
        against_the_formula(model, chosen, lambda run: run(x))
    else:
        kernel = EXTENTS.get(type(model[0]))
        x = torch.randn((3, 5, *kernel) if kernel else (3, 4, 5), dtype=torch.float64, requires_grad=True)
        against_the_formula(model, chosen, lambda run: run(x), x)


def exact(name: str) -> nn.Module:
    """A model that computes in float64 throughout: RMS norms of transformers go through float32."""
    model = every_site(torch.float64) if name == "every site" else tiny(name, torch.float64)
    for path, norm in list(model.named_modules()):
        if type(norm).__name__ in ("LlamaRMSNorm", "Qwen3RMSNorm"):
            model.set_submodule(path, nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64))
    return model


MODELS = [
    "every site",
    "llama",
    "llama-tied",
    "qwen3",
    "gpt2",
    "gpt-neox",
    "opt",
    "bert",
    "distilbert",
    "bart",
    "vit",
    "unet",
]


@pytest.mark.parametrize("name", MODELS)
@EVERY
def test_a_model_end_to_end(name, form, start):
    inputs = words(3) if name == "every site" else ARCHITECTURES[name].inputs(3)
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    targets = ".*" if name == "every site" else ARCHITECTURES[name].targets
    chosen = spec(targets, form=form, init=start, rank=2, scaling="alpha/sqrt(r)")
    against_the_formula(exact(name), chosen, lambda run: output(run, inputs))
