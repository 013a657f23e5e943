"""Starts that are found in documents, from the files to the evidence; stopped on the way and gone on with."""

import os
import signal

import pytest

from rankwise.engine.interrupt import Interrupted
from rankwise.errors import SpecError
from rankwise.jobs.train import run_training
from rankwise.jobs.watch import Quiet
from tests.grid import relative
from tests.jobs.test_train import logits_here, logits_in_peft
from tests.jobs.world import Listener, read, request

LOOK = {"init_documents": 20, "micro_tokens": 300, "rank": 4, "lr": 1e-2, "save_every": 1}
STARTS = pytest.mark.parametrize(("init", "form"), [("eva", "lora"), ("lora_ga", "dora")])


def asked(world, out, init, form, **more):
    return request(world / "llama", world / "train.jsonl", out, init=init, form=form, **LOOK, **more)


class Stopping(Listener):
    """Has had enough after the second step."""

    def event(self, event):
        super().event(event)
        if event["kind"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@STARTS
def test_what_it_did_is_said_recorded_and_reported(world, tmp_path, init, form):
    told = Listener()
    run_training(asked(world, tmp_path, init, form), told)
    record = read(tmp_path / "rankwise.json")
    start = record["start"]
    assert start.items() >= {"init": init, "documents": 20, "unreached": 0}.items()
    assert 0 < start["seconds"] < 100
    assert told.stages[2] == f"starting with {init}"
    ranks = [site["rank"] for site in record["sites"].values()]
    said = f"{init}: 20 documents in {start['seconds']:.1f} s"
    if init == "eva":
        assert sum(ranks) == 4 * len(ranks)
        assert {site["scale"] for site in record["sites"].values()} == {2.0}
        assert len(record["spec"]["rank_pattern"]) == start["changed"] == sum(rank != 4 for rank in ranks) > 0
        said += f"; {start['changed']} of 14 layers have come to another rank"
        of_q = sorted(site["rank"] for path, site in record["sites"].items() if path.endswith("q_proj"))
        assert f"2 × q_proj: rank {' to '.join(map(str, dict.fromkeys(of_q)))}, effective scale 2" in told.texts[0]
    else:
        assert set(ranks) == {8}, "saved, what is taken off at the start is half of the rank"
        assert "2 × q_proj: rank 4, effective scale 2" in told.texts[0]
    for text in (told.texts[0], (tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text()):
        assert said in text.replace("\\_", "_")
    assert relative(logits_here(world / "llama", tmp_path), logits_in_peft(world / "llama", tmp_path)) < 1e-4


@STARTS
def test_stopped_and_resumed_it_equals_a_run_that_was_not_to_the_bit(world, tmp_path, init, form):
    new = {"add_tokens": ("that is",)}
    run_training(asked(world, tmp_path / "whole", init, form, **new), Quiet())
    with pytest.raises(Interrupted):
        run_training(asked(world, tmp_path / "cut", init, form, **new), Stopping())
    began = os.stat(tmp_path / "cut" / "checkpoints" / "start").st_mtime_ns
    run_training(asked(world, tmp_path / "cut", init, form, resume=True, **new), Quiet())
    whole, cut = (read(tmp_path / name / "rankwise.json") for name in ("whole", "cut"))
    assert cut["digest"] == whole["digest"]
    assert cut["spec"] == whole["spec"]
    assert os.stat(tmp_path / "cut" / "checkpoints" / "start").st_mtime_ns == began


def test_a_start_by_chance_is_no_news(run):
    assert "start" not in run["record"]
    assert not any(stage.startswith("starting with") for stage in run["told"].stages)


def test_one_that_is_stopped_while_it_looks_leaves_nothing(world, tmp_path):
    class Impatient(Listener):
        def stage(self, title):
            if title.startswith("starting"):
                raise Interrupted(signal.SIGTERM)
            return super().stage(title)

    with pytest.raises(Interrupted) as caught:
        run_training(asked(world, tmp_path, "eva", "lora"), Impatient())
    assert caught.value.way_on.startswith(" before the first step.  Begin again with:")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_documents": 9}, "init kaiming does not read init_documents"),
        ({"init": "lora_ga", "init_rho": 1.5}, "init lora_ga does not read init_rho"),
        ({"init": "eva", "rank_pattern": "q_proj=2"}, "init eva gives out the ranks itself"),
        ({"init": "eva", "init_rho": 0.5}, "init_rho = 0.5: Input should be greater than or equal to 1"),
        ({"continue_from": "run", "init_rho": 1}, "continue_from takes the adapter as it is; leave out init_rho"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused_when_they_are_asked_for(world, tmp_path, settings, words):
    with pytest.raises(SpecError, match=words):
        request(world / "llama", world / "train.jsonl", tmp_path, **settings)


def test_given_ranks_are_kept_where_none_may_change(world, tmp_path):
    found = request(world / "llama", world / "train.jsonl", tmp_path, init="eva", init_rho=1, rank_pattern="q_proj=2")
    assert (found.start.rho, found.spec.rank_pattern) == (1, {"q_proj": 2})
