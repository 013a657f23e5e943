import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from rankwise.adapters.presets import SCENARIOS
from rankwise.cli.app import app
from rankwise.errors import SpecError
from rankwise.jobs.request import TrainRequest, read_config

TRAIN = get_command(app).commands["train"]
LEAST = {"model": "m", "data": "d.jsonl", "out": "o"}
# A value of every setting that is not its default, as it is asked for in Python.
EVERYTHING = {
    "model": "some model",
    "data": ("a b.jsonl", "c.csv"),
    "out": Path("runs/one"),
    "valid": "valid.jsonl",
    "test": "it's.jsonl",
    "force": True,
    "rank": 8,
    "alpha": 12.5,
    "targets": ("q_proj", "v_proj"),
    "exclude": ("layers.1.self_attn.q_proj", "lm_head"),
    "layers": "0-11,20,24-",
    "form": "adalora",
    "scaling": "alpha/sqrt(r)",
    "dropout": 0.05,
    "init": "gaussian",
    "rank_pattern": {r"layers\.(1|2)\..*": 4, "v_proj": 2},
    "alpha_pattern": {"a=b": 0.5},
    "target_rank": 3,
    "orthogonality": 0.25,
    "modules_to_save": ("lm_head", "norm"),
    "add_tokens": ("<tool>", "it's"),
    "lr": 5e-5,
    "lr_ratio": 4.0,
    "schedule": "cosine",
    "warmup": 0.0,
    "weight_decay": 0.1,
    "clip": 0.5,
    "epochs": 1.5,
    "max_steps": 7,
    "batch_tokens": 512,
    "micro_tokens": 128,
    "max_length": 99,
    "overlong": "drop",
    "train_on": "last",
    "seed": 3,
    "patience": 2,
    "evaluate_every": 5,
    "save_every": 6,
    "checkpointing": True,
    "dtype": "bfloat16",
    "storage": "nf4",
    "device": "cpu",
    "track": ("tensorboard", "wandb"),
    "task": "seq2seq",
    "replay": "what was: before.jsonl:0.25",
}
_APART = {"scenario", "continue_from", "keep_optimiser", "onto", "resume", "batch_documents", "hold_back", "nested"}
OF_EVA = {"init": "eva", "init_documents": 40, "init_rho": 1.5}  # which form adalora does without


def asked(command: str) -> TrainRequest:
    """What a command line asks for, read by the command line itself."""
    words = shlex.split(command)
    assert words[:2] == ["rankwise", "train"]
    with TRAIN.make_context("train", words[2:]) as context:
        return TrainRequest(**{k: v for k, v in context.params.items() if v not in (None, ()) and k != "json"})


def test_every_setting_is_an_option_and_every_option_a_setting():
    options = {parameter.name for parameter in TRAIN.params} - {"config", "json"}
    assert options == set(TrainRequest.model_fields)
    assert {*EVERYTHING, *OF_EVA} == options - _APART


@pytest.mark.parametrize("settings", [EVERYTHING, LEAST | OF_EVA], ids=["everything", "eva"])
def test_the_command_asks_for_the_same(settings):
    request = TrainRequest(**settings)
    assert asked(request.command()) == request


@pytest.mark.parametrize("targets", ["minimal", "mlp", "q_proj", r"re:.*\.(q|v)_proj", "re:it's, [a]"])
def test_the_command_asks_for_the_same_targets(targets):
    request = TrainRequest(**LEAST, targets=targets, exclude=targets)
    assert asked(request.command()).spec == request.spec


def test_the_command_of_further_training_and_of_a_scenario():
    further = TrainRequest(**LEAST, continue_from="runs/first", lr=1e-4)
    assert asked(further.command()) == further
    kept = TrainRequest(**LEAST, continue_from="runs/first", keep_optimiser=True)
    assert asked(kept.command()) == kept
    assert (kept.run.moments, further.run.moments) == (Path("runs/first"), None)
    onto = TrainRequest(**LEAST, onto="runs/first", rank=4)
    assert asked(onto.command()) == onto
    quick = TrainRequest(**LEAST, scenario="quick", rank=2)
    assert asked(quick.command()) == quick


TASKS = ("causal-lm", "masked-lm", "seq2seq", "sequence-classification", "image-classification")


@pytest.mark.parametrize("task", TASKS)
def test_a_task_brings_its_own_defaults_with_their_reasons_and_they_are_no_part_of_the_command(task):
    request = TrainRequest(**LEAST, task=task)
    assert request.command() == f"rankwise train --model m --data d.jsonl --out o --task {task}"
    assert asked(request.command()) == request
    reasons = {row["name"]: row["reason"] for row in request.table()}
    usual = TrainRequest(**LEAST)
    own = {name for name in TrainRequest.model_fields if getattr(request, name) != getattr(usual, name)} - {"task"}
    assert bool(own) == (task != "causal-lm")
    assert all(reasons[name].startswith(f"{task}: ") for name in own)
    assert reasons["task"] == "asked for"


def test_what_is_asked_for_stands_over_the_defaults_of_a_task():
    request = TrainRequest(**LEAST, task="sequence-classification", lr=1e-3, batch_tokens=2000)
    assert (request.lr, request.batch_tokens, request.batch_documents) == (1e-3, 2000, None)
    own, usual = TrainRequest(**LEAST, task="sequence-classification"), TrainRequest(**LEAST)
    assert request.epochs == own.epochs != usual.epochs
    assert {row["name"]: row["reason"] for row in request.table()}["lr"] == "asked for"


def test_a_step_is_counted_in_one_way():
    with pytest.raises(SpecError, match="not in both"):
        TrainRequest(**LEAST, batch_tokens=100, batch_documents=8)


def test_documents_are_held_back_only_where_none_are_given_to_judge_by():
    assert TrainRequest(**LEAST, hold_back=0.2).hold_back == 0.2
    with pytest.raises(SpecError, match="where there is no valid"):
        TrainRequest(**LEAST, hold_back=0.2, valid="v.jsonl")


def test_resume_and_what_is_switched_off_are_no_part_of_the_command():
    command = TrainRequest(**LEAST, resume=True, checkpointing=False, valid=None).command()
    assert command == "rankwise train --model m --data d.jsonl --out o"


WORD = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda word: not word.startswith("-") and word.strip()
)


@given(model=WORD, data=st.lists(WORD, min_size=1), lr=st.floats(1e-9, 1), seed=st.integers(0, 2**40), rank=WORD)
def test_any_name_survives_the_way_through_a_shell(model, data, lr, seed, rank):
    pattern = {re.escape(rank): 3}
    request = TrainRequest(model=model, data=data, out="o", lr=lr, seed=seed, rank_pattern=pattern)
    assert asked(request.command()) == request


# ── a config file ────────────────────────────────────────────────────────────────────────────────────────────────────


def config(tmp_path, text: str) -> dict:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


def test_a_file_says_the_same_as_options(tmp_path):
    text = r"""
model: some model
data: [a b.jsonl, c.csv]
out: runs/one
valid: valid.jsonl
test: it's.jsonl
rank: 8
alpha: 12.5
targets: q_proj, v_proj
exclude: layers.1.self_attn.q_proj, lm_head
layers: 24-, 20, 0-11
form: adalora
target-rank: 3
orthogonality: 0.25
scaling: alpha/sqrt(r)
dropout: 0.05
init: gaussian
rank-pattern: {'layers\.(1|2)\..*': 4, v_proj: 2}
alpha_pattern: a=b=0.5
modules_to_save: lm_head, norm
add_tokens: [<tool>, it's]
lr: 5e-5
lr_ratio: 4
schedule: cosine
warmup: 0
weight-decay: 0.1
clip: 0.5
epochs: 1.5
max_steps: 7
batch_tokens: 512
micro_tokens: 128
max_length: 99
overlong: drop
train_on: last
seed: 3
patience: 2
evaluate_every: 5
save_every: 6
checkpointing: true
force: true
dtype: bfloat16
storage: nf4
device: cpu
track: [tensorboard, wandb]
task: seq2seq
replay: "what was: before.jsonl:0.25"
"""
    assert TrainRequest(**config(tmp_path, text)) == TrainRequest(**EVERYTHING)
    text = "init: eva\ninit_documents: 40\ninit-rho: 1.5\n"
    assert TrainRequest(**LEAST, **config(tmp_path, text)) == TrainRequest(**LEAST, **OF_EVA)


def test_one_name_needs_no_list(tmp_path):
    found = TrainRequest(
        **config(tmp_path, "model: m\nout: o\ndata: one.jsonl\ntrack: mlflow\nmodules_to_save: lm_head")
    )
    assert (found.data, found.track, found.modules_to_save) == (("one.jsonl",), ("mlflow",), ("lm_head",))


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(SpecError, match=r"'batch_token' is not a setting; did you mean 'batch_tokens'\?"):
        TrainRequest(**LEAST, **config(tmp_path, "batch-token: 5"))


def test_all_problems_are_said_at_once(tmp_path):
    text = (
        "rnak: 3\nrank: 0\nlr: fast\nscaling: alpha*r\nrank_pattern: {'q[': 2, v: 0}\ntargets: 're:('\nscenario: huge"
    )
    with pytest.raises(SpecError) as caught:
        TrainRequest(out="o", **config(tmp_path, text))
    for piece in (
        "'model' is missing",
        "'data' is missing",
        "'rnak' is not a setting; did you mean 'rank'?",
        "rank = 0",
        "lr = 'fast'",
        "scaling = 'alpha*r'",
        "rank_pattern.v = 0",
        "targets = 're:('",
        "not a regular expression",
        "scenario = 'huge'",
        "'quick'",
    ):
        assert piece in str(caught.value)


@pytest.mark.parametrize("pattern", ["q_proj", "=4", "q_proj=many", "q(=4", 5, ["q_proj=4", "v_proj"]])
def test_a_pattern_that_says_no_number_is_refused(pattern):
    with pytest.raises(SpecError, match="rank_pattern"):
        TrainRequest(**LEAST, rank_pattern=pattern)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"model: [", "not YAML"),
        (b"- a\n- b", "expected 'name: value' lines, found list"),
        (b"", "expected 'name: value' lines, found NoneType"),
        (b"model: \xff", "cannot be read"),
    ],
)
def test_a_file_that_is_no_settings_is_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=f"run.yaml: {complaint}"):
        read_config(path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(SpecError, match=r"none.yaml: cannot be read"):
        read_config(tmp_path / "none.yaml")


# ── what a setting means ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asked_for", "targets"),
    [
        ("all-linear", "all-linear"),
        ("attention", "attention"),
        ("q_proj", ("q_proj",)),
        (" q_proj , v_proj,", ("q_proj", "v_proj")),
        (["q_proj", "attention"], ("q_proj", "attention")),
        (r"re:.*q_proj", r".*q_proj"),
        ("re:a,b", "a,b"),
    ],
)
def test_targets_are_a_preset_names_or_a_pattern(asked_for, targets):
    assert TrainRequest(**LEAST, targets=asked_for).spec.targets == targets


@pytest.mark.parametrize("targets", ["", ",", [], "re:"])
def test_targets_that_name_nothing_are_refused(targets):
    with pytest.raises(SpecError, match="names no layer"):
        TrainRequest(**LEAST, targets=targets)


@pytest.mark.parametrize("exclude", ["re:", "re:("])
def test_exclusions_that_cannot_be_read_are_refused(exclude):
    with pytest.raises(SpecError, match="exclude = "):
        TrainRequest(**LEAST, exclude=exclude)


@pytest.mark.parametrize("exclude", ["", ",", []])
def test_nothing_may_be_left_out(exclude):
    assert TrainRequest(**LEAST, exclude=exclude).spec == TrainRequest(**LEAST).spec


@pytest.mark.parametrize("written", ["layers: 3", "layers: [3]", "layers: '3'", "layers: 3-3", "layers: 3,3"])
def test_blocks_can_be_written_as_numbers_or_text(tmp_path, written):
    assert TrainRequest(**LEAST, **config(tmp_path, written)).spec.layers == "3"


def test_alpha_is_twice_the_rank_unless_it_is_asked_for():
    assert TrainRequest(**LEAST, rank=5).spec.alpha == 10
    assert TrainRequest(**LEAST, rank=5, alpha=3).spec.alpha == 3


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_stands_under_what_is_asked_for(name):
    chosen, spec = SCENARIOS[name], TrainRequest(**LEAST, scenario=name).spec
    assert (spec.rank, spec.alpha, spec.targets) == (chosen.rank, chosen.alpha, chosen.targets)
    changed = TrainRequest(**LEAST, scenario=name, rank=3).spec
    assert (changed.rank, changed.alpha, changed.targets) == (3, 6, chosen.targets)  # alpha = 2r
    same = TrainRequest(**LEAST, scenario=name, rank=chosen.rank).spec
    assert same.alpha == chosen.alpha


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    found = TrainRequest(model="m", data=["~/a.jsonl", "owner/name"], out="~/o", valid="~/v.jsonl", test="~/t.jsonl")
    assert found.data == ("/home/ann/a.jsonl", "owner/name")
    assert (str(found.out), found.valid, found.test) == ("/home/ann/o", "/home/ann/v.jsonl", "/home/ann/t.jsonl")


def reasons(request: TrainRequest) -> dict[str, str]:
    return {row["name"]: row["reason"] for row in request.table()}


def test_every_setting_has_its_reason():
    request = TrainRequest(**LEAST, scenario="quick", rank=3, lr=1e-3)
    found = reasons(request)
    assert list(found) == list(TrainRequest.model_fields)
    assert all(found.values())
    assert found["lr"] == found["rank"] == "asked for"
    assert found["targets"] == "quick: " + SCENARIOS["quick"].reason
    assert found["seed"] == "same seed, same bits on a CPU"
    assert {row["name"]: row["value"] for row in TrainRequest(**LEAST).table()}["alpha"] == 32


def test_an_adapter_that_is_trained_further_is_taken_as_it_is():
    table = {row["name"]: row for row in TrainRequest(**LEAST, continue_from="first").table()}
    taken = "rank alpha targets exclude layers scaling dropout init rank_pattern modules_to_save"
    for name in taken.split():
        assert table[name] == {"name": name, "value": None, "reason": "as in the adapter that is trained further"}
    with pytest.raises(SpecError, match="leave out dropout, rank"):
        TrainRequest(**LEAST, continue_from="first", rank=4, dropout=0.1)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_start_out_of_documents_is_for_causal_language_models(init):
    with pytest.raises(SpecError, match=f"init {init} looks at documents as task causal-lm reads them"):
        TrainRequest(**LEAST, init=init, task="masked-lm")


@pytest.mark.parametrize("replay", ["old.jsonl", "old.jsonl:", ":0.2", "old.jsonl:1", "old.jsonl:0", "old.jsonl:a lot"])
def test_old_documents_come_with_a_share_of_them(replay):
    with pytest.raises(SpecError, match="expected FILE:SHARE"):
        TrainRequest(**LEAST, replay=replay)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"keep_optimiser": True}, "say of which with continue_from"),
        ({"onto": "a", "continue_from": "b"}, "leave out continue_from"),
        ({"onto": "a", "modules_to_save": "norm"}, "leave out modules_to_save"),
        ({"onto": "a", "form": "dora"}, "is no sum"),
        ({"onto": "a", "storage": "nf4"}, "holds codes"),
        ({"onto": "a", "form": "full"}, "leave out onto"),
        ({"replay": "d.jsonl:0.2"}, "another file than those of data"),
        ({"replay": "old:0.2", "task": "image-classification"}, "rows of text"),
    ],
)
def test_training_on_in_ways_that_do_not_go_together_is_refused(settings, why):
    with pytest.raises(SpecError, match=why):
        TrainRequest(**LEAST, **settings)
