"""Answers: token for token what transformers would say, cut at the stop, the same again for the same seed."""

import pytest
import torch
import transformers as hf

from rankwise.data.template import Template
from rankwise.engine.forward import Forward
from rankwise.engine.generate import answer, stops_of
from rankwise.surgery.bank import Bank
from tests.data.chat import TEMPLATES, byte_level
from tests.grid import spec, state_of, trained
from tests.models import LLAMA, causal

TOKENIZER = byte_level()
WORDS = {**LLAMA, "vocab_size": len(TOKENIZER)}
CONFIGS = {
    "llama": hf.LlamaConfig(**WORDS),
    "gemma2": hf.Gemma2Config(**WORDS, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gpt2": hf.GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": hf.MixtralConfig(**WORDS, num_local_experts=3, num_experts_per_tok=2),
}
TARGETS = {"gpt2": ("c_attn", "c_fc", "wte"), "llama": ("q_proj", "embed_tokens", "lm_head")}
PROMPT = TOKENIZER("the user asks")["input_ids"]
LENGTH = 16


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = causal(CONFIGS[name])()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def generated(model: torch.nn.Module) -> list[int]:
    """What transformers itself says, the likeliest token each time and no end."""
    ids = torch.tensor([PROMPT])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False, eos_token_id=None
    )
    return out[0, len(PROMPT) :].tolist()


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def say(bank: Bank, name: str | None, **settings) -> str:
    return answer(bank, name, TOKENIZER, PROMPT, **{"stops": (), "max_new_tokens": LENGTH, **settings})


@pytest.mark.parametrize("name", CONFIGS)
def test_the_likeliest_answer_is_the_one_that_transformers_generates(name):
    """With an adapter: what it generates from an ordinary model into which the adapter has been baked."""
    model, targets = model_of(name), TARGETS.get(name, "all-linear")
    with Bank(model) as bank, Bank(model_of(name)) as other:
        trained(bank, "a", spec(targets))
        trained(other, "a", spec(targets))
        other.bake("a")
        want, tuned = generated(model_of(name)), generated(other.model)
        assert want != tuned, "the adapter does too little for the test to see"
        before = state_of(model)
        assert say(bank, None) == text_of(want)
        assert say(bank, "a") == text_of(tuned)
        assert say(bank, None) == text_of(want)
        assert state_of(model) == before


def test_a_model_that_asks_for_sampling_is_still_answered_by_the_likeliest_token_at_temperature_0():
    model = model_of("llama")
    want = text_of(generated(model))
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    model.generation_config.top_p = 0.9
    model.generation_config.top_k = 3
    with Bank(model) as bank:
        assert {say(bank, None) for _ in range(3)} == {want}


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("kind", ["common", "special"])
def test_an_answer_ends_before_the_first_of_its_stops_whatever_kind_of_token_it_is(at, kind):
    model = model_of("llama")
    special = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    tokens = generated(model)
    first = tokens.index(tokens[at])
    if kind == "special":  # the token changes places with the special one, in the head and in what is fed back
        swap = torch.arange(len(TOKENIZER))
        swap[[special, tokens[at]]] = swap[[tokens[at], special]]
        for table in (model.lm_head.weight, model.model.embed_tokens.weight):
            table.data = table.data[swap]
    stop = special if kind == "special" else tokens[at]
    told: list[str] = []
    with Bank(model) as bank:
        found = say(bank, None, stops=(stop, 5), say=told.append)
    assert found == "".join(told) == text_of(tokens[:first])


def test_without_stops_an_answer_is_as_long_as_it_may_be():
    model = model_of("llama")
    tokens = generated(model)
    model.generation_config.eos_token_id = tokens[3]  # the model's own end, which was not asked for
    with Bank(model) as bank:
        assert say(bank, None) == text_of(tokens)
        assert say(bank, None, max_new_tokens=3) == text_of(tokens[:3])


def test_text_comes_piece_by_piece_and_never_half_a_character():
    told: list[str] = []
    model = model_of("llama")
    chinese = TOKENIZER("你好，世界。看电影")["input_ids"]
    with torch.no_grad():  # every token is followed by the next of a sentence whose characters take several tokens
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for i, (now, after) in enumerate(zip([PROMPT[-1], *chinese], chinese, strict=False)):
            model.model.embed_tokens.weight[now, i] = 1.0
            model.lm_head.weight[after, i] = 1.0
    assert len(set(chinese)) == len(chinese) < 32
    with Bank(model) as bank:
        found = say(bank, None, max_new_tokens=len(chinese), say=told.append)
    assert found == "".join(told) == "你好，世界。看电影"
    assert len([piece for piece in told if piece]) > 3
    assert not any("\ufffd" in piece for piece in told)


def test_a_temperature_draws_and_the_seed_decides_what():
    with Bank(model_of("llama")) as bank:
        trained(bank, "a", spec("all-linear"))
        found = []
        for seed in (1, 1, 2, 3):
            torch.manual_seed(seed)
            found.append(say(bank, "a", temperature=1.5))
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert text_of(generated(model_of("llama"))) not in found


def test_a_low_temperature_comes_near_the_likeliest_answer():
    with Bank(model_of("llama")) as bank:
        assert say(bank, None, temperature=1e-4) == say(bank, None)


def test_answers_are_the_same_before_during_and_after_the_engines_hold():
    with Bank(model_of("llama")) as bank:
        trained(bank, "a", spec("all-linear"))
        before = say(bank, "a")
        with Forward(bank):
            pass
        assert say(bank, "a") == before


def test_gradients_are_not_gathered():
    with Bank(model_of("llama")) as bank:
        trained(bank, "a", spec("all-linear"))
        say(bank, "a")
        assert all(parameter.grad is None for _, parameter in bank.named_parameters("a"))


def test_an_answer_also_ends_where_the_model_says():
    template = Template(byte_level(TEMPLATES["chatml"]))
    for named, more in ((7, (7,)), ([7, 9, template.stops[0]], (7, 9)), (None, ())):
        model = model_of("llama")
        model.generation_config.eos_token_id = named
        assert stops_of(template, model) == (*template.stops, *more)
