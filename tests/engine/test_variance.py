"""Init `eva` against principal components of the inputs themselves, in float64, and against PEFT's own."""

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.eva import initialize_lora_eva_weights

from rankwise.data.order import Order, micro_batches
from rankwise.engine.begin import begin
from rankwise.engine.run import Start
from rankwise.errors import SpecError
from rankwise.surgery.bank import Bank
from tests.corpora import alike_corpus, random_corpus
from tests.grid import SCALINGS, relative, spec
from tests.models import ARCHITECTURES, CAUSAL, output, tiny

CORPUS = random_corpus([12, 9, 20, 15, 8, 11, 17, 5, 30, 25])
WHOLE = Start(micro_tokens=10_000)


def inputs(model, paths, corpus):
    """Path → `[S, I]`: what each layer is given where supervised tokens are predicted, one document at a time."""
    found = {path: [] for path in paths}
    rows = torch.empty(0)
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, given, path=path: found[path].append(given[0].flatten(0, -2)[rows].detach())
        )
        for path in paths
    ]
    with torch.no_grad():
        for i in range(len(corpus)):
            tokens, mask = corpus.document(i)
            rows = torch.tensor(np.flatnonzero(mask) - 1)
            model(input_ids=torch.tensor(tokens.astype(np.int64))[None])
    for handle in handles:
        handle.remove()
    return {path: torch.cat(pieces).double() for path, pieces in found.items()}


def components(rows):
    """Directions of largest variance and the share of each, by SVD of the centred rows."""
    centred = rows - rows.mean(0)
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    return right, values.square() / values.square().sum()


def begun(bank, corpus=CORPUS, start=WHOLE, **settings):
    how = begin(bank, "a", spec(**{"init": "eva", **settings}), corpus, start=start)
    return dict(bank.adapter("a").sites), how


def linear_targets(name):
    model = tiny(name)
    with Bank(model) as bank:
        linear = {path for path, site in bank.sites.items() if site.kind.width_dims == 1}
    return tuple(t for t in ARCHITECTURES[name].targets if any(path.endswith(t) for path in linear))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_is_what_the_inputs_vary_along_and_ranks_follow_the_shares(name):
    """Rank 16 of 32 and twice as much at the most: no direction is left out, so nothing is approximate."""
    with Bank(tiny(name)) as bank:
        sites, _ = begun(bank, targets=linear_targets(name), rank=16)
    found = inputs(tiny(name), sites, CORPUS)
    truth = {path: components(rows) for path, rows in found.items()}
    shares = sorted(((float(s), path) for path, (_, own) in truth.items() for s in own[1:32]), reverse=True)
    kept = [path for _, path in shares[: 15 * len(sites)]]
    for path, factors in sites.items():
        assert factors.rank == 1 + kept.count(path), path
        right, own = truth[path]
        for direction, want, share, after in zip(factors.A.double(), right, own, [*own[1:], 0], strict=False):
            if share - after > 1e-3:  # two shares so near to each other have no directions of their own
                assert abs(direction @ want) > 0.999, path
        assert not factors.B.any()


def test_documents_that_begin_alike_count_each():
    """What they share is computed once, and counts as often as it is predicted from."""
    corpus = alike_corpus([40, 41, 60, 45], [(0, 1, 39), (0, 2, 20), (0, 3, 39)])
    with Bank(tiny("llama")) as bank:
        sites, _ = begun(bank, corpus, targets=("o_proj", "lm_head"), rank=4, start=Start(micro_tokens=10_000, rho=1))
    for path, rows in inputs(tiny("llama"), sites, corpus).items():
        right, _ = components(rows)
        assert abs(sites[path].A[0].double() @ right[0]) > 0.999, path


def test_a_model_that_goes_row_by_row_has_the_same_start(monkeypatch):
    found = []
    for rows in (False, True):
        model = tiny("llama")
        if rows:
            monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda self: False)
        with Bank(model) as bank:
            found.append(begun(bank, targets=("q_proj", "down_proj", "lm_head"), rank=4)[0])
    for path, factors in found[0].items():
        assert factors.rank == found[1][path].rank
        torch.testing.assert_close(factors.A, found[1][path].A, rtol=1e-3, atol=1e-3)


def test_layers_that_share_an_input_share_their_directions():
    with Bank(tiny("llama")) as bank:
        sites, _ = begun(bank, targets="all-linear", rank=4)
    for layer in (0, 1):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            first, *others = (sites[f"model.layers.{layer}.{name}"].A for name in names)
            for other in others:
                both = min(len(first), len(other))
                assert torch.equal(first[:both], other[:both])


# ── ranks, alphas, and how far it looks ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("pattern", [{}, {"v_proj": 10.0}], ids=["one alpha", "two"])
def test_the_total_and_every_scale_stay_what_they_were(scaling, pattern):
    asked = spec("all-linear", init="eva", rank=4, alpha=6, scaling=scaling, alpha_pattern=pattern)
    with Bank(tiny("llama")) as bank:
        begin(bank, "a", asked, CORPUS, start=WHOLE)
        sites, told = bank.adapter("a").sites, bank.adapter("a").spec
    assert sum(factors.rank for factors in sites.values()) == 4 * len(sites)
    assert len({factors.rank for factors in sites.values()}) > 2
    assert max(factors.rank for factors in sites.values()) <= 8
    for path, factors in sites.items():
        assert factors.scale == pytest.approx(asked.scale_at(path), rel=1e-12)
        assert (told.rank_at(path), told.scale_at(path)) == (factors.rank, factors.scale)
    assert (told.rank, told.alpha, told.init) == (4, 6, "eva")


def test_with_rho_1_every_rank_stays_as_it_is_even_one_of_a_pattern():
    with Bank(tiny("llama")) as bank:
        sites, how = begun(bank, targets=("q_proj", "o_proj"), rank_pattern={"q_proj": 5}, start=Start(rho=1))
    assert {path.rsplit(".", 1)[1]: factors.rank for path, factors in sites.items()} == {"q_proj": 5, "o_proj": 3}
    assert how.changed == 0


def test_it_stops_where_all_directions_have_settled():
    corpus = random_corpus([20] * 40)
    for i in range(1, 40):  # one document again and again: the second time changes nothing
        for own, first in zip(corpus.document(i), corpus.document(0), strict=True):
            own[:] = first
    with Bank(tiny("llama")) as bank:
        _, how = begun(bank, corpus, targets="all-linear", rank=2, start=Start(documents=30, micro_tokens=20))
        assert (how.documents, how.unsettled) == (2, 0)
    with Bank(tiny("llama")) as bank:
        _, how = begun(bank, random_corpus([20] * 40), targets="all-linear", start=Start(documents=3, micro_tokens=20))
        assert how.documents == 3
        assert how.unsettled > 0


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_saved_it_does_the_same_in_peft(tmp_path):
    """The ranks and alphas that it came to are in the config."""
    model, words = tiny("llama"), ARCHITECTURES["llama"].inputs(3)
    with Bank(model) as bank:
        begun(bank, targets="all-linear", rank=4)
        for factors in bank.adapter("a").sites.values():
            factors.B.normal_(std=0.3)
        with bank.use("a"):
            want = output(model, words)
        bank.save("a", tmp_path)
        bank.load("again", tmp_path)
        ranks = [{p: f.rank for p, f in bank.adapter(n).sites.items()} for n in ("a", "again")]
        assert ranks[0] == ranks[1]
        bank.merge("a")
        assert relative(output(model, words), want) < 1e-5
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(output(theirs, words), want, rtol=1e-4, atol=1e-5)


def test_an_eva_spec_that_is_saved_can_be_built_again_but_not_begun_with_its_ranks():
    with Bank(tiny("llama")) as bank:
        begun(bank, targets="all-linear")
        told = bank.adapter("a").spec
        again = type(told)(**told.model_dump(mode="json"))
        assert again == told
        with pytest.raises(SpecError, match="rank_pattern"):
            begin(bank, "b", again, CORPUS)


# ── PEFT ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def peft_batch(corpus, documents):
    """A padded batch, in whose labels the positions count that predict supervised tokens."""
    pieces = [corpus.document(i) for i in documents]
    width = max(len(tokens) for tokens, _ in pieces)
    words, mask = torch.zeros(len(pieces), width, dtype=torch.int64), torch.zeros(len(pieces), width)
    labels = torch.full((len(pieces), width), -100)
    for row, (tokens, supervised) in enumerate(pieces):
        words[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens.astype(np.int64)), 1
        labels[row, np.flatnonzero(supervised) - 1] = 1
    return {"input_ids": words, "attention_mask": mask, "labels": labels}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_peft_finds_the_same_directions_and_ranks(name, pieces, rho):
    """One batch, which PEFT sees twice and is content, or two, after which a threshold of -1 contents it."""
    targets = {"llama": ["q_proj", "k_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[name]
    start = Start(rho=rho, micro_tokens=10_000 if pieces == 1 else int(len(CORPUS.tokens) * 0.6))
    with Bank(tiny(name)) as bank:
        sites, how = begun(bank, targets=tuple(targets), rank=8, alpha=8, start=start)
        told = bank.adapter("a").spec
    assert how.documents == len(CORPUS)
    config = peft.LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho),
        fan_in_fan_out=name == "gpt2",
    )
    config.eva_config.tau = 0.99 if pieces == 1 else -1.0
    theirs = peft.get_peft_model(tiny(name), config)
    batches = [peft_batch(CORPUS, documents) for documents in cut(pieces, start)]
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    layers = {path: theirs.get_submodule(f"base_model.model.{path}") for path in sites}
    assert ranks_by_input({path: layer.r["default"] for path, layer in layers.items()}) == ranks_by_input(
        {path: factors.rank for path, factors in sites.items()}
    )
    for path, layer in layers.items():
        own = layer.lora_A["default"].weight.detach()
        both = min(len(own), sites[path].rank)
        assert layer.scaling["default"] == pytest.approx(told.scale_at(path))
        torch.testing.assert_close(sites[path].A[:both].abs(), own[:both].abs(), rtol=0.02, atol=0.02)


def cut(pieces, start):
    documents = Order(CORPUS.lengths(), 0, 1, start.documents).epoch(0)[0]
    found = micro_batches(documents, CORPUS.lengths(), start.micro_tokens)
    assert len(found) == pieces
    return found


def ranks_by_input(ranks):
    """Layers that share an input have equal shares: which of them is given the odd rank is chance in PEFT."""
    found = {}
    for path, rank in ranks.items():
        found.setdefault(path.replace("k_proj", "q_proj"), []).append(rank)
    return {path: sorted(own) for path, own in found.items()}
