import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.adapters.combining import combine
from rankwise.adapters.recipe import Recipe
from rankwise.errors import AdapterMismatchError, BankError, DataError, RouteError, SpecError
from rankwise.jobs.chat import Chat, named_adapters
from rankwise.jobs.watch import Quiet
from tests.jobs.world import write_model


def chat(model, adapter=None, **settings):
    adapters = {"a": adapter} if adapter is not None else {}
    return Chat(str(model), adapters, Quiet(), **{"max_new_tokens": 12, **settings})


def answered(model, messages, length=12):
    """Greedy, token by token, without `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    begin = len(ids)
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    while len(ids) < begin + length and (not ids[begin:] or ids[-1] not in stops):
        with torch.no_grad():
            ids.append(int(plain(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[begin:], skip_special_tokens=True)


@pytest.fixture
def exact(world, monkeypatch):
    """As on a machine without bfloat16: in float32 the likeliest token does not hang on a rounding."""
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    return world / "llama"


def test_the_base_answers_as_it_does_by_hand_and_remembers(exact):
    talk = chat(exact)
    first = talk.reply("hello there")
    messages = [{"role": "user", "content": "hello there"}]
    assert first == answered(exact, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and you?"}]
    assert talk.reply("and you?") == answered(exact, messages)
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "user", "assistant"]


def test_what_was_said_can_be_forgotten(exact):
    talk = chat(exact)
    first = talk.reply("hello there")
    talk.reply("and you?")
    talk.reset()
    assert talk.reply("hello there") == first


def test_an_adapter_answers_for_itself(exact, run):
    assert chat(exact, run["out"]).reply("what is 3 and 3?") != chat(exact).reply("what is 3 and 3?")


def test_the_answer_comes_piece_by_piece_and_whole(exact):
    pieces = []
    reply = chat(exact, max_new_tokens=40).reply("你好", say=pieces.append)
    assert "".join(pieces) == reply
    assert len(pieces) > 3


def test_chance_is_only_used_when_it_is_asked_for(exact):
    def drawn(seed, **settings):
        torch.manual_seed(seed)
        return chat(exact, **settings).reply("hello")

    assert drawn(1) == drawn(2)
    assert drawn(1, temperature=5.0) != drawn(2, temperature=5.0)
    assert drawn(1, temperature=5.0) == drawn(1, temperature=5.0)


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    base = write_model(tmp_path / "base", template=None)
    with pytest.raises(DataError, match="has no chat template") as caught:
        chat(base)
    assert "instruct model" in caught.value.hint


def test_an_adapter_of_another_base_is_refused_unless_forced(world, adapter):
    with pytest.raises(AdapterMismatchError):
        chat(world / "tied", adapter)
    assert isinstance(chat(world / "tied", adapter, force=True).reply("hello"), str)


# ── several adapters on one base ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def several(exact, run, adapter):
    return Chat(str(exact), {"run": run["out"], "other": adapter}, Quiet(), max_new_tokens=12)


def test_who_answers_is_switched_and_each_answers_as_alone_on_what_was_said(several, exact, run, adapter):
    before = [tensor.clone() for tensor in several.base.model.state_dict().values()]
    assert several.speaking == "run"
    first = several.reply("hello")
    assert first == chat(exact, run["out"]).reply("hello")
    for asked, folder in (("other", adapter), ("base", None), ("run", run["out"])):
        several.use(asked)
        said = list(several.messages)
        alone = chat(exact, folder)
        alone.messages = list(said)
        assert several.reply("and you?") == alone.reply("and you?")
        several.messages = said
    assert all(torch.equal(a, b) for a, b in zip(several.base.model.state_dict().values(), before, strict=True))


def test_two_answer_side_by_side_and_the_conversation_goes_on_with_who_speaks(several, exact, run, adapter):
    found = several.compared("hello", ("run", "other"))
    assert found == [chat(exact, folder).reply("hello") for folder in (run["out"], adapter)]
    assert several.messages[-1]["content"] == found[0]
    several.compared("and you?", ("base", "other"))
    assert len(several.messages) == 2  # it was aside: neither of them speaks
    assert several.speaking == "run"


def test_a_mix_answers_as_the_adapter_that_combining_makes(several, exact):
    pair = {name: several.bank.adapter(name) for name in ("run", "other")}
    several.bank.put("both", combine(pair, Recipe(weights=(0.5, 0.5))).adapter)
    several.use("run=0.5,other=0.5")
    mixed = several.reply("what is 3 and 3?")
    several.reset()
    several.use("both")
    assert mixed == several.reply("what is 3 and 3?")


def test_who_is_not_there_is_told_and_nothing_has_changed(several, exact, adapter):
    for asked, error in (
        ("runn", BankError),
        ("run=a lot", SpecError),
        ("run=0.5,x=1", BankError),
        ("run=inf", RouteError),
    ):
        with pytest.raises(error):
            several.use(asked)
    assert several.speaking == "run"
    with pytest.raises(SpecError, match="bare base's name"):
        Chat(str(exact), {"base": adapter}, Quiet())


def test_adapters_are_called_by_a_name_or_by_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=1").mkdir()
    found = named_adapters(["runs/chats", "docs=runs/b", "x=1"])
    assert {name: str(place) for name, place in found.items()} == {
        "chats": "runs/chats",
        "docs": "runs/b",
        "x-1": "x=1",
    }
    with pytest.raises(SpecError, match="two adapters are called 'chats'"):
        named_adapters(["runs/chats", "chats=runs/b"])
    with pytest.raises(SpecError, match="named twice"):
        named_adapters(["a=runs/b", "b=runs/b"])
    with pytest.raises(BankError):
        named_adapters(["a b=runs/b"])
