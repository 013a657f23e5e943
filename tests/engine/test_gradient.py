"""Init `lora_ga` against the gradient itself: autograd over the weights in float64, and PEFT's own."""

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.loraga import preprocess_loraga

from rankwise.engine.begin import begin
from rankwise.engine.run import Start
from rankwise.frozen.coded import hold
from rankwise.surgery.bank import Bank
from tests.corpora import alike_corpus, random_corpus
from tests.grid import spec
from tests.models import ARCHITECTURES, CAUSAL, tiny

CORPUS = random_corpus([12, 9, 20, 15, 8, 11, 17, 5])
SCALE = 1 / 4  # 1/√γ


def mean_loss(model, corpus):
    """Of transformers' own forward, one document at a time; the mean over all supervised tokens."""
    total = 0.0
    for i in range(len(corpus)):
        tokens, mask = corpus.document(i)
        logits = model(input_ids=torch.tensor(tokens.astype(np.int64))[None]).logits[0, :-1]
        each = F.cross_entropy(logits, torch.tensor(tokens[1:].astype(np.int64)), reduction="none")
        total = total + each[torch.tensor(mask[1:])].sum()
    return total / int(corpus.supervised.sum())


def gradients(bank, corpus=CORPUS):
    """Path → dL/dW `[O, I]` of the clean model in the bank; of tied weights each place has its own."""
    weights = {path: site.module.weight.detach().clone().requires_grad_() for path, site in bank.sites.items()}
    parameters = {f"{path}.weight": weight for path, weight in weights.items()}
    loss = mean_loss(
        lambda **inputs: torch.func.functional_call(bank.model, parameters, (), inputs, tie_weights=False), corpus
    )
    found = torch.autograd.grad(loss, list(weights.values()))
    return {p: bank.sites[p].kind.oriented(g).flatten(1) for p, g in zip(weights, found, strict=True)}


def begun(bank, corpus=CORPUS, start=None, **settings):
    begin(bank, "a", spec(**{"init": "lora_ga", **settings}), corpus, start=start or Start(micro_tokens=40))
    return {p: (f.A.detach().double(), f.B.detach().double()) for p, f in bank.adapter("a").sites.items()}


def same_up_to_signs(got, want):
    """Rows that are equal or opposite."""
    return ((got * want).sum(1).abs() - want.norm(dim=1) * got.norm(dim=1)).abs().max() < 1e-4 and torch.allclose(
        got.norm(dim=1), want.norm(dim=1), rtol=1e-5
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_a_and_b_are_the_singular_vectors_of_the_gradient(name):
    """A quarter of the width as rank: as many directions are searched for as there are, and nothing is approximate."""
    targets = ARCHITECTURES[name].targets
    with Bank(tiny(name, torch.float32 if name == "mixtral" else torch.float64)) as bank:  # torch has no such product
        truth = gradients(bank)
    with Bank(tiny(name)) as bank:
        chosen = {p: min(s.shape.outputs, s.shape.inputs) // 4 for p, s in bank.sites.items()}
        chosen = {p: r for p, r in chosen.items() if any(p.endswith(t) for t in targets)}
        found = begun(bank, targets=targets, rank_pattern={f"^{path}": rank for path, rank in chosen.items()})
    assert found.keys() == chosen.keys()
    for path, (A, B) in found.items():
        left, values, right = torch.linalg.svd(truth[path].double(), full_matrices=False)
        rank, size = chosen[path], len(truth[path]) ** 0.25 * SCALE
        gaps = (values[:-1] - values[1:])[: 2 * rank] / values[0]
        assert gaps.min() > 1e-4, "two singular values so near to each other have no vectors of their own"
        assert same_up_to_signs(A, size * right[:rank]), path
        assert same_up_to_signs(B.t(), size * left[:, rank : 2 * rank].t()), path


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_the_base_in_codes_has_the_gradient_of_what_the_codes_mean(storage):
    model = hold(tiny("llama", torch.float64), storage)
    truth = tiny("llama", torch.float64)
    with torch.no_grad():
        for path, module in truth.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(model.get_submodule(path).weight)
    with Bank(truth) as bank:
        want = gradients(bank)
    with Bank(model) as bank:
        found = begun(bank, targets=("q_proj", "down_proj"), rank=8)
    for path, (A, B) in found.items():
        left, _, right = torch.linalg.svd(want[path], full_matrices=False)
        size = len(want[path]) ** 0.25 * SCALE
        assert same_up_to_signs(A, size * right[:8]), path
        assert same_up_to_signs(B.t(), size * left[:, 8:16].t()), path


def angle(got, want):
    """The largest principal angle between what rows span, as its sine."""
    got, want = (torch.linalg.qr(rows.t())[0] for rows in (got, want))
    return float(torch.linalg.matrix_norm(got - want @ (want.t() @ got), 2))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_few_directions_of_many_are_found_where_the_spectrum_has_a_gap(rank):
    """8 to 12 directions of 16 to 48 are searched.  Where there is no gap, others will do: they hold as much of G."""
    with Bank(tiny("llama", torch.float64)) as bank:
        truth = gradients(bank)
        found = begun(bank, targets="all-linear", rank=rank)
    apart = []
    for path, (A, _) in found.items():
        _, values, right = torch.linalg.svd(truth[path])
        held = (truth[path] @ torch.linalg.qr(A.t())[0]).norm() / values[:rank].norm()
        assert 0.998 < held <= 1 + 1e-6, path
        if values[rank - 1] > 1.25 * values[rank]:
            apart.append(angle(A, right[:rank]))
    assert len(apart) >= 2, "hardly a gap anywhere: the test proves nothing"
    assert max(apart) < 0.06


def test_how_the_documents_are_cut_changes_nothing():
    found = []
    corpus = alike_corpus([40, 41, 60, 45], [(0, 1, 39), (0, 2, 20)])
    for start in (Start(micro_tokens=20), Start(micro_tokens=10_000), Start(micro_tokens=60, checkpointing=True)):
        with Bank(tiny("llama", torch.float64)) as bank:
            found.append(begun(bank, corpus, start, targets="all-linear"))
    for other in found[1:]:
        for path, (A, B) in found[0].items():
            torch.testing.assert_close(other[path][0], A, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(other[path][1], B, rtol=1e-3, atol=1e-4)


def test_a_loss_through_the_first_step_falls_where_the_gradient_says():
    """What LoRA-GA is for: the first step of plain descent moves W along -G, more than a kaiming start does."""
    cosines = {}
    for init in ("kaiming", "lora_ga"):
        with Bank(tiny("llama", torch.float64)) as bank:
            truth = gradients(bank)
            begin(bank, "a", spec("all-linear", init=init, rank=4), CORPUS)
            with bank.use("a"):
                mean_loss(bank.model, CORPUS).backward()
            for path, factors in bank.adapter("a").sites.items():
                A, B = factors.A.detach().double(), factors.B.detach().double()
                moved = -(factors.B.grad.double() @ A + B @ factors.A.grad.double())
                cosine = -(moved * truth[path]).sum() / (moved.norm() * truth[path].norm())
                cosines.setdefault(init, []).append(float(cosine))
    assert min(cosines["lora_ga"]) > 0.85
    assert max(cosines["kaiming"]) < 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_finds_the_same_but_scales_it_otherwise(name):
    """PEFT (0.21) leaves A at length 1 and multiplies B by the singular values, where paper and authors scale both."""
    targets, rank = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_fc"]}[name], 8
    model = tiny(name, torch.float64)
    for module in model.modules():
        module.p = 0.0  # PEFT puts the model into training mode for this
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(stable_gamma=16),
        fan_in_fan_out=name == "gpt2",
    )
    preprocess_loraga(model, config, lambda: mean_loss(model, CORPUS).backward())
    theirs = peft.get_peft_model(model, config)
    with Bank(tiny(name, torch.float64)) as bank:
        truth = gradients(bank)
        found = begun(bank, targets=tuple(targets), rank=rank, alpha=2 * rank)
    for path, (A, B) in found.items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        values = torch.linalg.svdvals(truth[path] / len(CORPUS))[rank : 2 * rank]  # PEFT divides by its passes
        size = len(truth[path]) ** 0.25 * SCALE
        own_A, own_B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        assert same_up_to_signs(A, size * own_A), path
        theirs_O = len(layer.get_base_layer().weight) ** 0.25 * SCALE  # of a Conv1D it takes the inputs for the outputs
        assert same_up_to_signs(B.t() / size, (own_B / values / theirs_O).t()), path
