"""A smaller adapter, from files to files: what is written, what it says, and that a refusal leaves nothing behind."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.errors import AdapterMismatchError, DataError, RankwiseError, RunFolderError, SpecError
from rankwise.formats.record import describe_whole, write_record
from rankwise.frozen.load import load_base
from rankwise.jobs import compress as job
from rankwise.jobs.compress import run_compression
from rankwise.jobs.evaluate import run_evaluation
from rankwise.jobs.inspect import run_inspection
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from rankwise.surgery.bank import Bank
from tests.grid import relative
from tests.jobs.world import Listener, read, request, write_adapter, write_rows

PROMPT = torch.tensor([[5, 17, 99, 300, 42, 8]])
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "rankwise.json",
    "evaluation.json",
    "README.md",
    "report.html",
}


@pytest.fixture(scope="module")
def unseen(world):
    return write_rows(world / "unseen.jsonl", range(300, 340))


def compressed(world, adapter, unseen, out, watch=None, **settings):
    settings = {"tolerance": "50%", "dtype": "float32", "device": "cpu"} | settings
    return run_compression(str(world / "llama"), adapter, [str(unseen)], out, watch or Quiet(), **settings)


@pytest.fixture(scope="module")
def small(world, run, unseen):
    told = Listener()
    found = compressed(world, run["out"], unseen, world / "small", told)
    return {"out": world / "small", "found": found, "told": told}


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_smaller_adapter_lies_there_with_its_evidence_and_others_can_read_it(world, small):
    assert {path.name for path in small["out"].iterdir()} == FILES
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in small["out"].iterdir())
    assert not list(world.glob(".*.part"))
    record, found = read(small["out"] / "rankwise.json"), small["found"]
    assert record["parameters"] == found["parameters"]["compressed"] < 0.5 * found["parameters"]["whole"]
    stored = load_file(small["out"] / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == record["parameters"]


def test_what_it_returns_can_be_printed_and_is_what_it_wrote(world, run, small):
    found = small["found"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() == {
        *("worth", "tolerance", "gain", "parameters", "parts", "documents", "losses", "delta", "first", "second"),
        *("ranks", "adapter", "out", "report"),
    }
    assert found["documents"] == {"first": 20, "second": 20}
    assert found["delta"]["high"] <= found["tolerance"] == pytest.approx(0.5 * found["gain"]["mean"])
    assert found["report"] == str(small["out"] / "report.html")
    record = read(small["out"] / "rankwise.json")
    assert (
        record["compression"].items()
        >= {n: v for n, v in found.items() if n not in ("adapter", "out", "report")}.items()
    )
    assert record["digest"] != run["record"]["digest"]
    written = read(small["out"] / "evaluation.json")
    losses = {one["name"]: one["loss"] for one in written["adapters"]} | {"base": written["base"]["loss"]}
    assert losses == pytest.approx(found["losses"])


def test_the_record_keeps_how_the_whole_was_trained_and_says_how_it_became_smaller(world, run, unseen, small):
    record = read(small["out"] / "rankwise.json")
    for name in ("task", "settings", "data", "template"):
        assert record[name] == run["record"][name]
    assert "training" not in record
    command = record["command"]
    assert command.startswith(f"rankwise compress {run['out']} --model {world / 'llama'} --data {unseen} ")
    assert command.endswith("--worth fisher --tolerance 50%")


def test_the_pages_are_named_by_the_folder_and_not_by_the_place_it_was_written_in(small):
    for name in ("README.md", "report.html"):
        page = (small["out"] / name).read_text(encoding="utf-8")
        assert ".small" not in page
        assert ".part" not in page
    assert (small["out"] / "README.md").read_text(encoding="utf-8").count("\n# small\n") == 1


def test_the_page_has_no_more_digits_than_mean_something(small):
    page = " ".join((small["out"] / "report.html").read_text(encoding="utf-8").split())
    said = re.search(r"are kept, [\d.]+ %\. .* were allowed\. What counted for a part: fisher\.", page)
    assert said is not None
    share, *nats = re.findall(r"(?<![\d.])\d+\.(\d+)", said[0])
    assert len(share) == 1
    assert len({len(decimals) for decimals in nats}) == 1


def test_one_stage_after_the_other_is_told(world, small):
    stages = small["told"].stages
    assert stages[:3] == [f"loading {world / 'llama'}", "reading the documents", "looking at gradients"]
    assert any(re.fullmatch(r"\d+% of the parameters, second half", stage) for stage in stages)
    assert stages[-1] == "writing the report"


# ── what others make of it ───────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_the_bank_and_peft_read_it_and_say_the_same(world, run, small):
    with Bank(load_base(world / "llama", dtype="float32").model) as bank:
        bank.load("small", small["out"])
        assert bank.adapter("small").digest() == read(small["out"] / "rankwise.json")["digest"]
        assert {path: own.rank for path, own in bank.adapter("small").sites.items()} == small["found"]["ranks"]
        with bank.use("small"):
            ours = bank.model(input_ids=PROMPT).logits
    plain = AutoModelForCausalLM.from_pretrained(world / "llama")
    base = plain(input_ids=PROMPT).logits
    theirs = PeftModel.from_pretrained(plain, small["out"])(input_ids=PROMPT).logits
    assert relative(ours, theirs) < 1e-5
    assert relative(ours, base) > 1e-2  # else the comparison above would prove nothing


def test_evaluated_on_the_same_documents_it_is_as_it_says(world, run, unseen, small):
    """On all of them, of which the second half was said: between the base and the whole."""
    found = run_evaluation(str(world / "llama"), [run["out"], small["out"]], [str(unseen)], Quiet(), dtype="float32")
    whole, smaller = (one["loss"] for one in found["adapters"])
    assert whole < smaller < found["base"]["loss"]
    assert smaller - whole < small["found"]["tolerance"]


@pytest.mark.filterwarnings("default::rankwise.errors.RankwiseWarning")
def test_it_can_be_inspected_and_trained_further(world, small, tmp_path):
    assert run_inspection(str(small["out"]))["sites"].keys() == small["found"]["ranks"].keys()
    asked = request(world / "llama", world / "train.jsonl", tmp_path / "on", continue_from=small["out"], max_steps=1)
    run_training(asked, Quiet())
    ranks = {path: site["rank"] for path, site in read(tmp_path / "on" / "rankwise.json")["sites"].items()}
    assert ranks == small["found"]["ranks"]


def test_tokens_of_its_own_and_their_tokenizer_stay(world, tmp_path):
    rows = [{"prompt": f"what is {n}?", "completion": f"<tool>say {n}</tool>"} for n in range(80)]
    for name, some in (("train", rows[:40]), ("unseen", rows[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    new = {"add_tokens": "<tool>,</tool>", "lr": 1e-2}
    run_training(request(world / "llama", tmp_path / "train.jsonl", tmp_path / "run", **new), Quiet())
    compressed(world, tmp_path / "run", tmp_path / "unseen.jsonl", tmp_path / "out", worth="plain")
    before, after = (read(tmp_path / name / "rankwise.json") for name in ("run", "out"))
    assert before["new_tokens"] == after["new_tokens"]
    assert before["tokens"] == after["tokens"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["<tool>", "</tool>"])
    assert ids == list(after["new_tokens"].values())


# ── what is refused leaves nothing behind ────────────────────────────────────────────────────────────────────────────


def test_a_tolerance_that_nobody_could_meet_writes_nothing(world, run, unseen, tmp_path):
    with pytest.raises(DataError, match="nothing is shown to be dispensable"):
        compressed(world, run["out"], unseen, tmp_path / "out", tolerance="1e-9", worth="activations")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["write_report", "write_card", "write_text"])
def test_the_folder_is_there_whole_or_not_at_all(world, run, unseen, tmp_path, monkeypatch, failing):
    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(job, failing, fails)
    with pytest.raises(RunFolderError, match=r"out: cannot be written: no space left on device"):
        compressed(world, run["out"], unseen, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten_and_an_empty_folder_is_taken(world, run, unseen, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(RunFolderError, match="nothing was overwritten"):
            compressed(world, run["out"], unseen, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    (tmp_path / "out" / "mine").unlink()
    compressed(world, run["out"], unseen, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_an_adapter_of_form_dora_and_a_whole_model_are_refused(world, unseen, tmp_path):
    dora = write_adapter(tmp_path / "dora", world / "llama", form="dora")
    with pytest.raises(SpecError, match="of form dora, whose magnitudes are no sum of parts"):
        run_compression("no/model", dora, [str(unseen)], tmp_path / "out", Quiet())  # before one is loaded
    (tmp_path / "full").mkdir()
    write_record(tmp_path / "full", describe_whole(1, "", {"name": "", "fingerprint": "", "vocabulary": 1}, {}))
    with pytest.raises(SpecError, match="holds a model, all of whose weights were trained, and no adapter"):
        compressed(world, tmp_path / "full", unseen, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dora", "full"]


MISTAKES = {
    "tolerance": ({"tolerance": "a bit"}, "tolerance 'a bit'"),
    "all of it": ({"tolerance": "100%"}, "expected one between 0 and 1"),
    "worth": ({"worth": "fischer"}, "did you mean 'fisher'"),
    "seed": ({"seed": -1}, "seed = -1"),
    "length": ({"max_length": 1}, "max_length = 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_nonsense_is_told_before_anything_is_loaded(world, run, unseen, tmp_path, mistake):
    settings, said = MISTAKES[mistake]
    told = Listener()
    with pytest.raises(SpecError, match=said):
        compressed(world, run["out"], unseen, tmp_path / "out", told, **settings)
    assert told.stages == []
    assert list(tmp_path.iterdir()) == []


def test_another_base_and_documents_that_are_not_there_are_refused(world, adapter, unseen, tmp_path):
    base = {"dtype": "float32", "device": "cpu"}
    with pytest.raises(AdapterMismatchError, match="fingerprint"):
        run_compression(str(world / "tied"), adapter, [str(unseen)], tmp_path / "out", Quiet(), **base)
    with pytest.raises(RankwiseError, match="unsen"):
        compressed(world, adapter, world / "unsen.jsonl", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
