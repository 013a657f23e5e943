"""Rows of tokens: an adapter with some says what a model with these very rows says, whatever else a bank holds."""

import pytest
import torch

from rankwise.adapters.tokens import TokenRows
from rankwise.errors import AdapterMismatchError, BankError, SpecError, TargetError
from rankwise.surgery.bank import Bank
from tests.grid import DTYPES, relative, spec, state_of, trained
from tests.models import ARCHITECTURES, CAUSAL, VOCAB, output, tiny

NEW = (VOCAB, VOCAB + 1)
OLD = (9, 4)
NAMES = [*CAUSAL, "t5"]
EVERY = pytest.mark.parametrize("name", NAMES)


def inputs_of(name: str, rows: int = 3, new: tuple[int, ...] = NEW) -> dict[str, torch.Tensor]:
    """Words with new ones among them, and some of those whose rows are trained."""
    inputs = ARCHITECTURES[name].inputs(rows)
    for place, token in enumerate((*new, *OLD)):
        inputs["input_ids"][place % rows, 2 + place] = token
    return inputs


def lora(name: str, **settings):
    """An adapter of a layer that is neither embedding nor head."""
    return spec(ARCHITECTURES[name].targets[:1], **settings)


def rewritten(name: str, tokens: dict[str, TokenRows], size: int, dtype: torch.dtype = torch.float32):
    """The model enlarged by transformers and given these rows; heads that share the embedding's weight share them."""
    model = tiny(name, dtype)
    if size > VOCAB:
        model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for path, rows in tokens.items():
            model.get_submodule(path).weight[rows.ids] = rows.rows.to(dtype)
    return model


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_it_starts_as_the_base_and_new_rows_at_the_mean(name, dtype):
    model, inputs = tiny(name, dtype).requires_grad_(False), inputs_of(name)
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    known = ARCHITECTURES[name].inputs(3)
    clean = output(model, known)
    with Bank(model) as bank:
        bank.add("fresh", lora(name, new_tokens=NEW))
        assert torch.equal(output(model, known)[..., :VOCAB], clean)  # the base knows more, and says the same
        before = output(model, inputs)
        with bank.use("fresh"):
            assert torch.equal(output(model, inputs), before)
        for path, rows in bank.adapter("fresh").tokens.items():
            want = (weights[0] if path != "lm_head" else weights[1]).double().mean(0)
            torch.testing.assert_close(rows.rows.double(), want.expand(2, -1), rtol=1e-6, atol=1e-7)
    assert len(bank.vocabulary.own) == (1 if weights[0] is weights[1] else 2)


@EVERY
@torch.no_grad()
def test_trained_tokens_start_where_they_are(name):
    model, inputs = tiny(name), inputs_of(name, new=())
    before = output(model, inputs)
    with Bank(model) as bank:
        bank.add("fresh", lora(name, trained_tokens=OLD))
        with bank.use("fresh"):
            after = output(model, inputs)
    rest = [token for token in range(VOCAB) if token not in OLD]
    assert torch.equal(after[..., rest], before[..., rest])
    assert relative(after, before) < 1e-6  # one product over these rows alone sums in another order


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_it_says_what_a_model_with_these_rows_says(name, dtype):
    """Heads that share the embedding's weight, second and third embeddings (T5), scaled ones (Gemma)."""
    model, inputs = tiny(name, dtype), inputs_of(name)
    with Bank(model) as bank:
        trained(bank, "a", lora(name, new_tokens=NEW, trained_tokens=OLD, alpha=1e-9))
        with bank.use("a"):
            got = output(model, inputs)
        want = output(rewritten(name, bank.adapter("a").tokens, VOCAB + 2, dtype), inputs)
        assert relative(got, want) < (1e-5 if dtype == torch.float32 else 0.02)
        assert relative(output(model, inputs), want) > 0.05


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "t5"])
def test_gradients_are_those_of_a_model_with_these_rows(name):
    model, inputs = tiny(name, torch.float64).requires_grad_(False), inputs_of(name)
    with Bank(model) as bank:
        trained(bank, "a", lora(name, new_tokens=NEW, trained_tokens=OLD, alpha=1e-9))
        tokens = bank.adapter("a").tokens
        with bank.use("a"):
            out = output(model, inputs)
        weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        got = torch.autograd.grad((out * weights).sum(), [rows.rows for rows in tokens.values()])
        plain = rewritten(name, tokens, VOCAB + 2, torch.float64)
    (output(plain, inputs) * weights).sum().backward()
    for (path, rows), gradient in zip(tokens.items(), got, strict=True):
        assert relative(gradient, plain.get_submodule(path).weight.grad[rows.ids]) < 1e-6, path


@EVERY
def test_rows_routed_equal_rows_alone_though_two_adapters_call_other_tokens_by_the_same_numbers(name):
    model, inputs = tiny(name), inputs_of(name, rows=4)
    names = ["one", None, "other", "plain"]
    with Bank(model) as bank:
        trained(bank, "one", lora(name, new_tokens=NEW), seed=1)
        trained(bank, "other", lora(name, new_tokens=(*NEW, VOCAB + 2), trained_tokens=OLD), seed=2)
        trained(bank, "plain", lora(name), seed=3)
        with bank.use("other"):
            weights = torch.randn(output(model, inputs).shape)

        def gradients() -> dict[str, torch.Tensor]:
            every = {f"{n}/{p}": t for n in bank.names for p, t in bank.named_parameters(n)}
            found = {p: torch.zeros_like(t) if t.grad is None else t.grad for p, t in every.items()}
            for tensor in every.values():
                tensor.grad = None
            return found

        alone = []
        for row, route in enumerate(names):
            with bank.use(route):
                alone.append(output(model, {k: v[row : row + 1] for k, v in inputs.items()}))
                if route is not None:
                    (alone[-1] * weights[row : row + 1]).sum().backward()
        want = gradients()
        with bank.route(names):
            together = output(model, inputs)
            (together * weights).sum().backward()
        assert together.shape[-1] == VOCAB + 3
        for row, out in enumerate(alone):
            assert relative(together[row], out[0]) < 1e-5
        for path, gradient in gradients().items():
            assert relative(gradient, want[path]) < 1e-4, path
        assert not torch.equal(alone[0], alone[2])


@torch.no_grad()
def test_the_model_knows_as_many_tokens_as_those_it_holds_need():
    model = tiny("llama")
    before = state_of(model)
    with Bank(model) as bank:
        for name, new in (("two", NEW), ("three", (*NEW, VOCAB + 2)), ("none", ())):
            bank.add(name, lora("llama", new_tokens=new))
        sizes = []
        for gone in ("none", "three", "two"):
            sizes.append(output(model, ARCHITECTURES["llama"].inputs(1)).shape[-1])
            assert model.config.vocab_size == model.vocab_size == sizes[-1]
            bank.remove(gone)
        assert sizes == [VOCAB + 3, VOCAB + 3, VOCAB + 2]
        assert state_of(model) == before


@pytest.mark.parametrize("token", [VOCAB + 2, 5000, -1])
def test_a_token_that_nobody_knows_is_an_error_still(token):
    with Bank(tiny("llama")) as bank:
        bank.add("a", lora("llama", new_tokens=NEW))
        with pytest.raises(IndexError), bank.use("a"):
            bank.model(input_ids=torch.tensor([[3, token]]))


def test_transformers_own_loss_counts_the_new_tokens_too():
    """So that a model with a bank can be given to other trainers."""
    model, ids = tiny("llama"), torch.tensor([[5, NEW[0], 9, NEW[1], 4]])
    with Bank(model) as bank:
        trained(bank, "a", lora("llama", new_tokens=NEW))
        with bank.use("a"):
            out = model(input_ids=ids, labels=ids)
            want = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
            torch.testing.assert_close(out.loss, want)
            out.loss.backward()
        assert all(rows.rows.grad.norm() > 0 for rows in bank.adapter("a").tokens.values())


# ── merged ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@EVERY
@torch.no_grad()
def test_merged_and_baked_it_says_the_same(name):
    model, inputs = tiny(name), inputs_of(name)
    with Bank(model) as bank:
        trained(bank, "a", lora(name, new_tokens=NEW, trained_tokens=OLD))
        bank.add("larger", lora(name, new_tokens=(*NEW, VOCAB + 2)))
        with bank.use("a"):
            want = output(model, inputs)[..., : VOCAB + 2]
        bank.merge("a")
        assert relative(output(model, inputs)[..., : VOCAB + 2], want) < 1e-5
        bank.unmerge()
        bank.bake("a")
    got = output(model, inputs)
    assert got.shape == want.shape
    assert relative(got, want) < 1e-5
    assert model.config.vocab_size == VOCAB + 2
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == VOCAB + 2
    tied = tiny(name).config.tie_word_embeddings
    assert model.config.tie_word_embeddings == tied
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@torch.no_grad()
def test_baking_one_without_tokens_enlarges_nothing():
    model = tiny("llama-tied")
    with Bank(model) as bank:
        trained(bank, "plain", lora("llama-tied"))
        bank.add("a", lora("llama-tied", new_tokens=NEW))
        bank.bake("plain")
    assert output(model, ARCHITECTURES["llama"].inputs(1)).shape[-1] == model.config.vocab_size == VOCAB


@torch.no_grad()
def test_rows_of_a_head_alone_untie_it_when_they_are_baked():
    model, inputs = tiny("llama-tied"), inputs_of("llama-tied", new=())
    with Bank(model) as bank:
        bank.add("a", lora("llama-tied", trained_tokens=OLD))
        value = bank.adapter("a")
        head = TokenRows(OLD, torch.randn(2, 32))
        bank.put("b", type(value)(value.spec, value.sites, tokens={"lm_head": head}))
        with bank.use("b"):
            want = output(model, inputs)
        bank.bake("b")
    assert relative(output(model, inputs), want) < 1e-5
    assert not model.config.tie_word_embeddings


# ── the base, recognised ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@torch.no_grad()
def test_the_base_is_recognised_whether_or_not_it_was_enlarged(name, tmp_path):
    """Trained on the base enlarged by hand, used on the base as it is, and the other way round."""
    larger, smaller = tiny(name), tiny(name)
    larger.resize_token_embeddings(VOCAB + 2)
    for here, there, place in ((larger, smaller, "a"), (smaller, larger, "b")):
        with Bank(here) as bank:
            trained(bank, "a", lora(name, new_tokens=NEW))
            bank.save("a", tmp_path / place)
            with bank.use("a"):
                want = output(here, inputs_of(name))
        with Bank(there) as bank:
            bank.load("a", tmp_path / place)
            with bank.use("a"):
                assert relative(output(there, inputs_of(name)), want) < 1e-6


@torch.no_grad()
def test_an_adapter_without_tokens_is_recognised_on_the_enlarged_base_too(tmp_path):
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", lora("llama"))
        bank.save("a", tmp_path)
    larger = tiny("llama")
    larger.resize_token_embeddings(VOCAB + 5)
    with Bank(larger) as bank:
        bank.load("a", tmp_path)
    larger.model.embed_tokens.weight[:VOCAB] += 1
    with pytest.raises(AdapterMismatchError, match="fingerprint"):
        Bank(larger).load("b", tmp_path)


@torch.no_grad()
def test_where_the_base_has_rows_to_spare_new_tokens_take_those(tmp_path):
    """As Qwen's, whose matrices are larger than the vocabulary; what lies there was never trained, and is no start."""
    model = tiny("llama")
    spare = (VOCAB - 3, VOCAB - 2)
    with Bank(model) as bank:
        bank.add("a", lora("llama", new_tokens=spare))
        rows = bank.adapter("a").tokens["model.embed_tokens"].rows
        torch.testing.assert_close(rows, model.model.embed_tokens.base.weight[: spare[0]].mean(0).expand(2, -1))
        assert output(model, ARCHITECTURES["llama"].inputs(1)).shape[-1] == VOCAB
        bank.save("a", tmp_path)
    Bank(tiny("llama")).load("a", tmp_path)


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("llama", {"new_tokens": (VOCAB + 1, VOCAB + 2)}, rf"rows for {VOCAB} tokens and would need {VOCAB + 3}"),
        ("llama", {"trained_tokens": (5, VOCAB)}, rf"trained_tokens {VOCAB}: the model has rows for {VOCAB}"),
        ("llama", {"new_tokens": (0, 1)}, "no token before it"),
        ("vit", {"new_tokens": (0, 1)}, "has no embedding of tokens"),
        ("unet", {"trained_tokens": (1,)}, "has no embedding of tokens"),
        ("bert", {"trained_tokens": (1,)}, "has a bias"),
        ("bart", {"new_tokens": NEW}, "final_logits_bias has a place for each token, which cannot be enlarged"),
    ],
)
def test_tokens_that_do_not_fit_the_model_are_refused_in_a_sentence(name, settings, said):
    model = tiny(name)
    before = state_of(model)
    with pytest.raises(TargetError, match=said):
        Bank(model).add("a", lora(name, **settings))
    assert state_of(model) == before


def test_a_model_without_a_head_for_words_has_rows_in_its_embedding_alone():
    with Bank(tiny("roberta")) as bank:
        bank.add("a", lora("roberta", new_tokens=NEW))
        assert list(bank.adapter("a").tokens) == ["roberta.embeddings.word_embeddings"]
        with bank.use("a"):
            bank.model(input_ids=torch.tensor([[3, *NEW]]))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("other", [{"targets": ("lm_head",)}, {"targets": ("q_proj", "embed_tokens")}])
def test_a_layer_that_is_adapted_as_a_whole_has_no_rows_of_tokens_beside_it(other, first):
    two = [spec(("q_proj",), new_tokens=NEW), spec(**other)]
    model = tiny("llama")
    before = state_of(model)
    with Bank(model) as bank:
        bank.add("one", two[first])
        with pytest.raises(BankError, match="separate banks"):
            bank.add("other", two[1 - first])
    assert state_of(model) == before
    with pytest.raises(BankError, match="exclude that layer"):
        Bank(model).add("both", spec(other["targets"], new_tokens=NEW))


@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens"])
def test_nor_has_one_that_is_trained_whole(whole):
    with Bank(tiny("llama")) as bank, pytest.raises(BankError, match=rf"trains '[a-z.]*{whole}' whole"):
        bank.add("a", spec(("v_proj",), modules_to_save=(whole,), trained_tokens=OLD))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"new_tokens": (5, 5)}, "5 more than once"),
        ({"trained_tokens": (-1,)}, "trained_tokens"),
        ({"new_tokens": (7,), "trained_tokens": (7, 8)}, "tokens 7 are in new_tokens and in trained_tokens"),
    ],
)
def test_tokens_that_make_no_sense_are_refused_with_the_spec(settings, said):
    with pytest.raises(SpecError, match=said):
        spec(**settings)


def test_rows_for_another_model_are_refused_with_every_reason():
    with Bank(tiny("llama")) as bank:
        bank.add("a", lora("llama", trained_tokens=OLD))
        value = bank.adapter("a")
        tokens = {
            "model.embed_tokens": TokenRows(OLD, torch.zeros(2, 31)),
            "lm_head": TokenRows((VOCAB + 3,), torch.zeros(1, 32)),
            "model.words": TokenRows(OLD, torch.zeros(2, 32)),
        }
        with pytest.raises(AdapterMismatchError) as caught:
            bank.put("b", type(value)(value.spec, value.sites, tokens=tokens))
    for piece in (
        "model.embed_tokens: rows of 31 numbers, here 32",
        f"would need {VOCAB + 4}, of which there are only 1 more",
        "model.words: rows of tokens for what is neither embedding nor head here",
    ):
        assert piece in str(caught.value)
