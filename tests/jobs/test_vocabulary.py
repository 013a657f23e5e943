"""New tokens from the command to the merged model, on the base as it lies on disk, which nothing changes."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.errors import AdapterFileError, AdapterMismatchError, RankwiseWarning, SpecError
from rankwise.frozen.load import load_base
from rankwise.jobs.chat import Chat
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.inspect import run_inspection
from rankwise.jobs.merge import run_merge
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from rankwise.surgery.bank import Bank
from tests.grid import relative
from tests.jobs.world import Listener, read, request, write_adapter

TOKENS = "<tool>,</tool>"
BASES = ["llama", "tied"]


def write_calls(path, numbers):
    rows = [
        {"prompt": f"what is {n} and {n}?", "completion": f"<tool>add {n} {n}</tool> that is {2 * n}"} for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluated(world, base, *adapters, **settings):
    said = {"dtype": "float32", "device": "cpu", **settings}
    return run_evaluation(str(world / base), list(adapters), [str(world / "calls-test.jsonl")], Quiet(), **said)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def calls(world):
    write_calls(world / "calls-test.jsonl", range(300, 312))
    return write_calls(world / "calls.jsonl", range(100, 140))


@pytest.fixture(scope="module", params=BASES)
def called(request_of, request):
    return request_of[request.param]


@pytest.fixture(scope="module")
def request_of(world, calls):
    """A run with new tokens on each base: its folder, its record, what was told, and the base's bytes before it."""
    found = {}
    for base in BASES:
        told, before, out = Listener(), bytes_of(world / base), world / f"calls-{base}"
        summary = run_training(request(world / base, calls, out, add_tokens=TOKENS, lr=1e-2, max_steps=8), told)
        found[base] = {"base": base, "out": out, "summary": summary, "told": told, "before": before}
    return found


def test_the_tokens_travel_with_the_adapter_and_the_base_is_untouched(world, called):
    out, size = called["out"], read(world / called["base"] / "config.json")["vocab_size"]
    assert bytes_of(world / called["base"]) == called["before"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(TOKENS.split(",")) == [size, size + 1]
    assert tokenizer.tokenize("a<tool>b</tool>")[1::2] == TOKENS.split(",")
    assert tokenizer.decode([size], skip_special_tokens=True) == "<tool>"  # a word, and shown as one
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(world / called["base"]).chat_template
    record = read(out / "rankwise.json")
    assert record["new_tokens"] == {"<tool>": size, "</tool>": size + 1}
    assert record["spec"]["new_tokens"] == [size, size + 1]
    heads = ["model.embed_tokens"] + ["lm_head"] * (called["base"] == "llama")
    assert record["tokens"] == {path: [size, size + 1] for path in heads}
    assert record["base"]["vocabulary"] == size
    assert run_inspection(str(out))["tokens"] == record["tokens"]


def test_what_is_about_to_be_trained_is_told_with_how_often_it_is_met(called):
    text = "\n".join(called["told"].texts)
    assert "new tokens, and how often they are met: <tool> × 38, </tool> × 38" in text
    assert "model.embed_tokens: rows of 2 tokens" in text
    assert called["summary"]["evaluation"]["adapters"][0]["delta"]["high"] < 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_it_on_a_base_enlarged_as_the_card_says(world, called):
    tokenizer = AutoTokenizer.from_pretrained(called["out"])
    ids = torch.tensor([tokenizer("what is <tool>add 3 3</tool>")["input_ids"]])
    base = load_base(world / called["base"], dtype="float32").model
    with Bank(base) as bank:
        bank.load("a", called["out"])
        with bank.use("a"):
            want = base(input_ids=ids).logits
    model = AutoModelForCausalLM.from_pretrained(world / called["base"])
    model.resize_token_embeddings(len(tokenizer))
    theirs = peft.PeftModel.from_pretrained(model, called["out"]).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)
    card = (called["out"] / "README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("path/to/this/folder")\nmodel = ' in card
    assert "model.resize_token_embeddings(len(tokenizer))" in card
    assert "Rows of its own in" in card


@torch.no_grad()
def test_it_is_evaluated_merged_and_talked_to_on_the_base_as_it_is(world, called, tmp_path, monkeypatch):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)  # in float32 no likeliest token is in doubt
    base, out = called["base"], called["out"]
    found = run_merge(str(world / base), out, tmp_path / "merged", Quiet())
    assert (found["tokens"], found["prompts"]) == (2, 6)
    size = read(world / base / "config.json")["vocab_size"]
    config = read(tmp_path / "merged" / "config.json")
    assert config["vocab_size"] == size + 2
    assert config["tie_word_embeddings"] == (base == "tied")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (base == "llama")
    assert len(stored["model.embed_tokens.weight"]) == size + 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == size + 2
    shutil.copy(world / "calls-test.jsonl", tmp_path)
    apart, merged = evaluated(world, base, out), evaluated(tmp_path, "merged")
    assert merged["base"]["loss"] == pytest.approx(apart["adapters"][0]["loss"], rel=1e-5)
    assert merged["tokens"] == apart["tokens"]
    said = [
        Chat(str(model), adapters, Quiet(), max_new_tokens=12).reply("what is <tool> and 3?")
        for model, adapters in ((world / base, {"a": out}), (tmp_path / "merged", {}), (world / base, {}))
    ]
    assert said[0] == said[1] != said[2]


def test_trained_further_it_keeps_its_tokens(world, calls, called, tmp_path):
    asked = request(world / called["base"], calls, tmp_path / "more", continue_from=called["out"], max_steps=2)
    run_training(asked, Quiet())
    before, after = read(called["out"] / "rankwise.json"), read(tmp_path / "more" / "rankwise.json")
    assert after["tokens"] == before["tokens"]
    assert after["template"] == before["template"]
    assert (tmp_path / "more" / "tokenizer.json").read_bytes() == (called["out"] / "tokenizer.json").read_bytes()
    rows = [load_file(place / "adapter_model.safetensors") for place in (called["out"], tmp_path / "more")]
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert 0 < relative(rows[1][key], rows[0][key]) < 0.2
    assert evaluated(world, called["base"], called["out"], tmp_path / "more")["documents"] == 12


def test_a_token_that_no_document_holds_is_told(world, calls, tmp_path):
    asked = request(world / "llama", calls, tmp_path / "out", add_tokens="<tool>,<toool>", max_steps=1)
    with pytest.warns(RankwiseWarning, match="no training document holds '<toool>'"):
        run_training(asked, Quiet())


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_that_are_there_are_refused_all_at_once(world, calls, tmp_path):
    asked = request(world / "llama", calls, tmp_path / "out", add_tokens="<|im_end|>,<new>,a")
    with pytest.raises(
        SpecError, match=r"(?s)'<\|im_end\|>' is one already \(number \d+\).*'a' is one already"
    ) as caught:
        run_training(asked, Quiet())
    assert "<new>" not in str(caught.value)


@pytest.mark.parametrize("tokens", [["a,b"], [" a"], ["", "b"], "a,a"])
def test_texts_that_a_command_cannot_say_are_refused(world, calls, tmp_path, tokens):
    with pytest.raises(SpecError, match=r"add_tokens = .*expected texts of tokens"):
        request(world / "llama", calls, tmp_path / "out", add_tokens=tokens)


def copied(folder, to, without=()):
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("checkpoints", *without))
    return to


def test_rows_for_tokens_that_nobody_can_write_are_refused_but_by_force(world, request_of, tmp_path):
    bare = copied(request_of["llama"]["out"], tmp_path / "bare", ["tokenizer*"])
    with pytest.raises(AdapterFileError, match=r"\(49\d, 49\d\), and no tokenizer that does"):
        evaluated(world, "llama", bare)
    assert evaluated(world, "llama", bare, force=True)["documents"] == 12


def test_a_tokenizer_of_another_base_is_refused(world, request_of, tmp_path):
    place = copied(request_of["llama"]["out"], tmp_path / "strange")
    tokenizer = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (place / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(AdapterMismatchError, match=r"its tokenizer knows '\w' and 1 other tokens .* not, or by other"):
        evaluated(world, "llama", place)


def test_adapters_that_mean_different_tokens_are_compared_one_by_one(world, calls, request_of, tmp_path):
    other = request(world / "llama", calls, tmp_path / "other", add_tokens="</tool>,<tool>", max_steps=1)
    run_training(other, Quiet())
    with pytest.raises(AdapterMismatchError, match="different tokens of their own"):
        evaluated(world, "llama", request_of["llama"]["out"], other.out)
    plain = write_adapter(tmp_path / "plain", world / "llama")
    both = evaluated(world, "llama", request_of["llama"]["out"], plain)
    assert [one["name"] for one in both["adapters"]] == ["calls-llama", "plain"]


@pytest.mark.filterwarnings("ignore")
def test_tokens_trained_by_peft_that_the_tokenizer_knows_need_no_other(world, calls, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world / "tied")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[70, 80]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens" in name:
                parameter += 0.5
    wrapped.save_pretrained(tmp_path / "theirs")
    found = evaluated(world, "tied", tmp_path / "theirs")
    assert found["adapters"][0]["loss"] != pytest.approx(found["base"]["loss"], rel=1e-3)
