"""A mistake ends in a sentence on standard error, an exit code and a way out; never in a traceback."""

import json
import shutil

import pytest

from rankwise.formats.record import describe_whole, write_record
from tests.jobs.world import write_adapter, write_model


def no_traceback(ran):
    assert "Traceback" not in ran.err + ran.out
    assert "rankwise/" not in ran.err.replace("/rankwise/", "")  # no line of our own code


# What is typed after the verb's right options, and what the answer must name.  {world} is a folder of small models.
TRAIN = "train --model {world}/llama --data {world}/train.jsonl --out {new}"
EVALUATE = "evaluate --model {world}/llama --data {world}/test.jsonl --adapter {adapter}"
COMPRESS = "compress {run} --model {world}/llama --data {world}/test.jsonl"
MISTAKES = {
    "values out of range": (f"{TRAIN} --rank 0 --lr -1 --dropout 1", "rank = 0", "lr = -1.0", "dropout = 1.0"),
    "words that are none": (f"{TRAIN} --scaling foo --schedule bar", "'alpha/sqrt(r)'", "'cosine'"),
    "no pattern": (f"{TRAIN} --targets re:foo[", "targets = 're:foo['", "not a regular expression"),
    "no number": (f"{TRAIN} --rank-pattern q_proj", "rank_pattern", "expected PATTERN=NUMBER"),
    "targets not there": (f"{TRAIN} --targets q_porj", "'q_porj' matches no layer", "'q_proj'", "→ layers here:"),
    "blocks not there": (f"{TRAIN} --layers 0-2,7", "layers 2,7: none of the targeted layers", "only in blocks 0 to 1"),
    "no blocks": (f"{TRAIN} --layers=-4", "layers = '-4'", "counted from 0"),
    "left out but not there": (f"{TRAIN} --exclude q_porj", "exclude 'q_porj' matches no layer", "'q_proj'"),
    "all left out": (f"{TRAIN} --targets q_proj --exclude attention", "leave none of the targeted layers"),
    "a token already": (f"{TRAIN} --add-tokens <|im_end|>", "'<|im_end|>' is one already", "→ leave them out"),
    "no config": (f"{TRAIN} --config none.yaml", "none.yaml: cannot be read"),
    "key of the config": (f"{TRAIN} --config {{world}}/typo.yaml", "'bath_tokens'", "did you mean 'batch_tokens'?"),
    "no data": ("train --model {world}/llama --data {world}/trian.jsonl --out {new}", "did you mean 'train.jsonl'?"),
    "folder as data": ("train --model {world}/llama --data {world} --out {new}", "a folder, expected a file", "→"),
    "kind of data": ("train --model {world}/llama --data {world}/typo.yaml --out {new}", "no kind of data file", "→"),
    "bad rows": (
        "train --model {world}/llama --data {world}/bad.jsonl --out {new}",
        "2 problems in the data",
        "bad.jsonl:1: ",
        "bad.jsonl:3: ",
        "→ ",
    ),
    "no model": ("train --model {world}/lama --data {world}/train.jsonl --out {new}", "no such folder", "→"),
    "no device": (f"{TRAIN} --device toaster", "no device 'toaster'", "→ auto, cpu, cuda"),
    "no such tracker": (f"{TRAIN} --track tensorbord", "no tracker 'tensorbord'", "tensorboard"),
    "folder taken": (
        "train --model {world}/llama --data {world}/train.jsonl --out {run}",
        "holds a run already",
        "→ --resume",
    ),
    "nothing to resume": (f"{TRAIN} --resume", "no run to resume", "→ leave out --resume"),
    "further with a rank": (f"{TRAIN} --continue-from {{adapter}} --rank 4", "leave out rank"),
    "number format": (f"{EVALUATE} --dtype float8", "no number format 'float8'", "→ auto, bfloat16"),
    "no adapter": (
        "evaluate --model {world}/llama --data {world}/test.jsonl --adapter {new}",
        "adapter_config.json: no such file",
        "→",
    ),
    "twice": (f"{EVALUATE} --adapter {{adapter}}", "named twice", "→"),
    "all too long": (f"{EVALUATE} --max-length 8", "nothing is left", "→ raise max_length"),
    "another base": (
        "evaluate --model {world}/tied --data {world}/test.jsonl --adapter {adapter}",
        "fingerprint",
        "--force",
    ),
    "folder for the model": (
        "merge --model {world}/llama --adapter {adapter} --out {run}",
        "nothing was overwritten",
        "→ choose another --out",
    ),
    "no tolerance": (
        f"{COMPRESS} --out {{small}} --tolerance much",
        "tolerance 'much'",
        "→ a share of the gain, such as 2%",
    ),
    "no worth": (
        f"{COMPRESS} --out {{small}} --worth fischer",
        "no worth 'fischer'; did you mean 'fisher'?",
        "→ plain, activations, fisher",
    ),
    "nothing to leave out": (
        f"{COMPRESS} --out {{small}} --tolerance 1e-9 --worth activations --dtype float32",
        "nothing is shown to be dispensable",
        "→ more documents",
    ),
    "folder for the smaller": (f"{COMPRESS} --out {{run}}", "nothing was overwritten", "→ choose another --out"),
    "magnitudes": (
        "compress {world}/dora --model {world}/llama --data {world}/test.jsonl --out {small}",
        "of form dora, whose magnitudes are no sum of parts",
        "→ merge it",
    ),
    "a model to compress": (
        "compress {world}/full --model {world}/llama --data {world}/test.jsonl --out {small}",
        "full: holds a model, all of whose weights were trained, and no adapter",
        "→ ",
    ),
    "neither": ("inspect {new}", "neither an adapter's folder nor a model", "→ an adapter's folder holds"),
    "quickstart": ("quickstart --model {world}/llama --out {run}", "not an empty folder", "→ choose another --out"),
    "chat template": ("chat --model {world}/plain", "has no chat template", "→ chat with an instruct model"),
}


@pytest.fixture(scope="module")
def words(world, adapter, run, tmp_path_factory):
    """Fills in the places of an example; some files with mistakes in them are made."""
    (world / "typo.yaml").write_text("bath_tokens: 5\n")
    (world / "bad.jsonl").write_text('{"prompt": 3, "completion": "a"}\n{"prompt": "q", "completion": "a"}\nnot json\n')
    write_model(world / "plain", template=None)
    write_adapter(world / "dora", world / "llama", form="dora")
    (world / "full").mkdir()
    write_record(world / "full", describe_whole(1, "", {"name": "", "fingerprint": "", "vocabulary": 1}, {}))
    new = tmp_path_factory.mktemp("new")
    places = {"world": world, "adapter": adapter, "run": run["out"], "new": new / "out", "small": new / "small"}
    return lambda line: [word.format(**places) for word in line.split()]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_a_way_out(rankwise, words, mistake):
    line, *pieces = MISTAKES[mistake]
    ran = rankwise(*words(line))
    assert ran.code == 1
    assert ran.out == ""
    no_traceback(ran)
    told = ran.err[ran.err.index("error: ") :]
    for piece in pieces:
        assert piece in told


@pytest.mark.parametrize(
    "mistake", ["bad rows", "another base", "neither", "folder for the model", "no tolerance", "nothing to leave out"]
)
def test_with_json_a_mistake_is_an_object(rankwise, words, mistake):
    line, *pieces = MISTAKES[mistake]
    ran = rankwise(*words(line), "--json")
    assert ran.code == 1
    assert ran.json.keys() == {"error", "message", "hint"}
    assert ran.err == ""
    assert ran.json["error"].endswith("Error")
    for piece in pieces:
        assert piece in f"{ran.json['message']}\n  → {ran.json['hint']}"


WRONG_USAGE = {
    "train --rnk 4": ("No such option: --rnk", "--rank"),
    "train --rank many": ("Invalid value for '--rank'",),
    "train --data": ("requires an argument",),
    "train": ("'--model'", "'--data'", "'--out'"),
    "trian": ("No such command 'trian'", "train"),
    "evaluate --model m --data d": ("Missing option '--adapter'",),
    "merge": ("Missing option",),
    "compress": ("Missing",),
    "compress a --model m --data d": ("Missing option '--out'",),
    "inspect": ("Missing argument",),
    "chat --model m --temperature -1": ("--temperature",),
}


@pytest.mark.parametrize("line", WRONG_USAGE)
@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_usage_is_code_two_on_standard_error_alone(rankwise, line, as_json):
    ran = rankwise(*line.split(), *(["--json"] if as_json and line != "train --data" else []))
    assert ran.code == 2
    assert ran.out == ""
    no_traceback(ran)
    for piece in WRONG_USAGE[line]:
        assert piece in ran.err


def test_a_mistake_leaves_nothing_in_the_way_of_trying_again(rankwise, world, tmp_path):
    line = ["train", "--model", world / "llama", "--data", world / "train.jsonl", "--out", tmp_path / "out"]
    short = ["--max-steps", 1, "--dtype", "float32"]
    assert rankwise(*line, *short, "--targets", "q_porj").code == 1
    assert rankwise(*line, *short, "--track", "tensorbord").code == 1
    assert rankwise(*line, *short).code == 0


def test_a_folder_that_cannot_be_written_is_told(rankwise, world, adapter):
    for verb in (["train", "--data", world / "train.jsonl"], ["merge", "--adapter", adapter]):
        ran = rankwise(*verb, "--model", world / "llama", "--out", "/proc/nowhere/out")
        assert ran.code == 1
        no_traceback(ran)
        assert "/proc/nowhere" in ran.err


def test_a_record_that_is_cut_short_is_told(rankwise, world, adapter, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    whole = json.loads((broken / "rankwise.json").read_text())
    for content in ("{", "[]", '{"schema": 1}', json.dumps(whole | {"base": None}), json.dumps(whole | {"base": {}})):
        (broken / "rankwise.json").write_text(content)
        ran = rankwise("evaluate", "--model", world / "llama", "--data", world / "test.jsonl", "--adapter", broken)
        assert ran.code == 1, content
        no_traceback(ran)
        assert "rankwise.json: not a rankwise record" in ran.err
