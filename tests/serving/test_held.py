"""A step's logits against the model's own, through one adapter alone; which models are served, and how far."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from torch import Tensor

from rankwise.engine.agree import agree
from rankwise.errors import ModelError
from rankwise.frozen.coded import hold
from rankwise.kernels.library import native
from rankwise.serving.held import Chunk, Held
from rankwise.surgery.bank import Bank
from tests.grid import moved, spec, state_of, trained
from tests.models import CAUSAL, LLAMA, VOCAB, tiny

NAMES = (None, "a", "b", "a", "c")
AS_ONE = {"llama", "llama-tied", "qwen2", "qwen3", "mistral", "granite"}


def text(seed: int, size: int = 9) -> list[int]:
    return torch.randint(3, VOCAB, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(bank: Bank, name: str | None, tokens: list[int]) -> Tensor:
    with bank.use(name), torch.no_grad():
        return bank.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def stepped(held: Held) -> list[Tensor]:
    """What comes after eight and after nine tokens of each of five texts, all of them in two steps."""
    first = [Chunk(text(i)[:8], 8, [i], name, True) for i, name in enumerate(NAMES)]
    second = [Chunk(text(i)[8:], 9, [i], name, True) for i, name in enumerate(NAMES)]
    return [torch.stack(pair) for pair in zip(held.logits(first), held.logits(second), strict=True)]


def expected(bank: Bank) -> list[Tensor]:
    return [alone(bank, name, text(i))[7:] for i, name in enumerate(NAMES)]


def three(model: torch.nn.Module, **named: object) -> Bank:
    bank = Bank(model)
    for seed, name in enumerate("abc"):
        trained(bank, name, spec(**{"targets": "all-linear", "rank": 2 + 4 * seed, **named}), seed, size=0.1)
    return bank


@contextmanager
def roomy(bank: Bank) -> Iterator[Held]:
    """With room for a step of every name."""
    with Held(bank) as held:
        held.make_room(16 * len(NAMES))
        yield held


DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LESS = {"gemma2", "mixtral"}  # transformers computes a part of these in float32 whatever they are in


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_step_gives_what_the_model_gives(architecture, dtype):
    dtype = torch.float32 if architecture in LESS and dtype == torch.float64 else dtype
    bank = three(tiny(architecture, dtype))
    want, before = expected(bank), state_of(bank.model)
    with roomy(bank) as held:
        assert agree(stepped(held), want)
        compiled = native() is not None and dtype != torch.float64
        assert held.as_one == (architecture in AS_ONE and compiled)
    assert state_of(bank.model) == before


@pytest.mark.parametrize("form", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("code", ["int8", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_base_in_codes(architecture, code, form):
    model = tiny(architecture, torch.bfloat16)
    hold(model, code)
    bank = three(model, form=form)
    want = expected(bank)
    with roomy(bank) as held:
        assert agree(stepped(held), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["lora", "dora", "adalora"])
def test_forms(form, dtype):
    bank = three(tiny("llama", dtype), form=form)
    want = expected(bank)
    with roomy(bank) as held:
        assert held.as_one == (native() is not None)
        assert agree(stepped(held), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_wider_than_a_thread_takes_at_once(dtype):
    """Tiles of sixteen outputs, six at a time: 13, 7 and 27 of them here, the last one ragged."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | {"hidden_size": 208, "intermediate_size": 421}))
    bank = three(model.to(dtype).eval())
    want = expected(bank)
    with roomy(bank) as held:
        assert held.as_one == (native() is not None)
        assert agree(stepped(held), want)


def test_modules_trained_whole_and_rows_of_tokens_follow_the_route():
    bank = Bank(tiny("llama"))
    trained(bank, "a", spec(("q_proj",), modules_to_save=("input_layernorm",)), 0, size=0.1)
    trained(bank, "b", spec(("v_proj",)), 1, size=0.1)
    bank.add("c", spec(("up_proj",), new_tokens=(5, 9)), 2)
    moved(bank, "c", 2, 0.1)
    want = expected(bank)
    with roomy(bank) as held:
        assert not held.as_one
        assert agree(stepped(held), want)


def test_a_parameter_that_was_written_to_is_taken_in_between_steps():
    bank = three(tiny("llama"))
    with roomy(bank) as held:
        with held.apart():
            moved(bank, "a", seed=9, size=0.1)
            want = expected_apart(bank, held)
        assert agree(stepped(held), want)


def test_adapters_come_and_go_and_those_beside_them_stay_as_they_were():
    """A name that is given again, sites that the others have not, more adapters than there was room for."""
    bank = three(tiny("llama"))
    with roomy(bank) as held:
        laid = held.rack.nbytes
        with held.apart():
            want = expected_apart(bank, held)
        for turn in range(3):
            with held.apart():
                for i in range(7):
                    trained(bank, f"more{i}", spec(("q_proj", "lm_head"), rank=8), 10 * turn + i, size=0.1)
            assert held.rack.nbytes > laid
            assert agree(stepped(held), want)
            with held.apart():
                bank.remove("b")
                trained(bank, "b", spec(("v_proj",)), turn, size=0.1)
                want = expected_apart(bank, held)
            assert agree(stepped(held), want)
            with held.apart():
                bank.remove("b")
                trained(bank, "b", spec("all-linear", rank=6), 1, size=0.1)
                for i in range(7):
                    bank.remove(f"more{i}")
                want = expected_apart(bank, held)
            assert agree(stepped(held), want)
            assert held.rack.nbytes == laid


def test_what_only_joins_leaves_products_and_layers_where_they_are():
    bank = three(tiny("llama"))
    with roomy(bank) as held:
        turn, layers = held.rack.turn, held._layers
        with held.apart():
            trained(bank, "d", spec("all-linear", rank=4), 7, size=0.1)
        assert (held.rack.turn, held._layers) == (turn, layers)
        with held.apart():
            bank.merge("a")
        assert held.rack.turn != turn
        with held.apart():
            bank.unmerge()
            want = expected_apart(bank, held)
        assert agree(stepped(held), want)


def test_where_only_members_come_and_go_a_name_that_is_given_again_is_another_adapter():
    """Who stays is not looked at: what is written to it is taken in when somebody says that more may have changed."""
    bank = three(tiny("llama"))
    with roomy(bank) as held:
        before = stepped(held)
        with held.apart(members_only=True):
            bank.remove("b")
            trained(bank, "b", spec(("v_proj",)), 5, size=0.1)
            trained(bank, "d", spec("all-linear"), 3, size=0.1)
            want = expected_apart(bank, held)
        assert agree(stepped(held), want)
        assert not agree(before, want)
        with held.apart(members_only=True):  # from one that has nothing on the rack
            bank.remove("b")
            trained(bank, "b", spec(("embed_tokens",)), 5, size=0.1)
        with held.apart(members_only=True):
            bank.remove("b")
            trained(bank, "b", spec(("v_proj",)), 6, size=0.1)
            want = expected_apart(bank, held)
        assert agree(stepped(held), want)
        with held.apart(members_only=True):
            moved(bank, "a", seed=9, size=0.1)
            new = expected_apart(bank, held)
        assert agree(stepped(held), want)
        with held.apart():
            pass
        assert agree(stepped(held), new)


def test_factors_of_who_has_gone_are_freed():
    bank = three(tiny("llama"))
    with roomy(bank) as held:
        with held.apart():
            trained(bank, "d", spec("all-linear"), 3)
        gone = [weakref.ref(p) for _, p in bank.named_parameters("d")]
        gone += [weakref.ref(shelf.grouped.lows[3].A) for shelf in held.rack._layers.values()]
        with held.apart():
            bank.remove("d")
        assert [ref() for ref in gone if ref() is not None] == []


def expected_apart(bank: Bank, held: Held) -> list[Tensor]:
    """By the model itself, whose attention is the engine's as long as it is held."""
    own = copy.deepcopy(bank)
    own.model.set_attn_implementation("eager")
    return expected(own)


@pytest.mark.parametrize(
    ("name", "said"),
    [("bert", "cannot be served"), ("t5", "an encoder beside its decoder"), ("vit", "no language-model")],
)
def test_other_models_are_refused(name, said):
    with pytest.raises(ModelError, match=said), Held(Bank(tiny(name))):
        pass


def test_a_model_with_a_state_is_refused():
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2)
    torch.manual_seed(0)
    model = hf.MambaForCausalLM(config).eval()
    with pytest.raises(ModelError, match="MambaForCausalLM"), Held(Bank(model)):
        pass


def test_the_context_ends_where_texts_would_change_one_another():
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    for rope, context in (({"rope_type": "default", "rope_theta": 10000.0}, 128), (scaled, 32)):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, rope_parameters=rope)).eval()
        with Held(Bank(model)) as held:
            assert held.context == context
