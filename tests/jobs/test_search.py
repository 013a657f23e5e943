"""A search from files to a recommendation, killed and gone on with, and its winner trained again."""

import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from rankwise.engine.interrupt import Interrupted
from rankwise.errors import DataError, RunFolderError, SpecError
from rankwise.formats.peft import read_adapter
from rankwise.jobs.search import SearchRequest, opened, run_search, winner
from rankwise.jobs.train import run_training
from rankwise.search.allocation import patterned
from rankwise.search.budget import BUDGETS
from rankwise.search.study import Found, Trial
from tests.jobs.tasks import BASES, write_task
from tests.jobs.world import Listener, read, request, write_rows

BEGIN = {"lr": 2e-2, "rank": 4, "alpha": 8, "max_steps": 48}
CHANGES = ("seconds", "out", "report", "command", "pack")  # from one search to the same one elsewhere


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        part: str(write_rows(folder / f"{part}.jsonl", range(start, start + count)))
        for part, start, count in (("train", 100, 40), ("valid", 500, 24), ("test", 700, 24))
    }


def searched(world, rows, out, watch=None, **own):
    settings = {**BEGIN, "valid": rows["valid"], "test": rows["test"], **own.pop("train", {})}
    asked = SearchRequest(**{"budget": "standard", "ranks": "1,2,4", **own})
    return run_search(asked, request(world / "llama", rows["train"], out, **settings), watch or Listener())


@pytest.fixture(scope="module")
def found(world, rows, tmp_path_factory):
    return searched(world, rows, tmp_path_factory.mktemp("search") / "s", also=("form=dora",))


def test_every_question_is_answered_and_written_down(found):
    written = read(Path(found["out"]) / "search.json")
    assert {name: value for name, value in found.items() if name not in ("out", "report")} == written
    assert [name for name, value in written.items() if value is None] == ["allocation"]  # which was not asked for
    assert [point["rank"] for point in written["ladder"]["points"]] == [1, 2, 4]
    assert sum(point["chosen_in"] for point in written["ladder"]["points"]) == pytest.approx(1)
    assert written["rate"]["best"] in [point["lr"] for point in written["rate"]["rungs"][-1]["points"]]
    assert [point["name"] for point in written["methods"]["points"]] == ["form=dora"]
    assert written["confirm"]["seeds"] == 3
    steps = [rung["share"] * found["full_run"]["steps"] for rung in written["rate"]["rungs"]]
    assert steps == pytest.approx([10, 12, 48])  # an eighth would be 6: too few to tell rates apart
    assert Path(found["report"]).exists()


def test_a_budget_may_train_one_adapter_at_all_ranks_beside_the_ladder(world, rows, tmp_path):
    assert BUDGETS["full"].nested
    settings = {**BEGIN, "max_steps": 12, "valid": rows["valid"], "test": rows["test"]}
    asked = request(world / "llama", rows["train"], tmp_path / "s", **settings)
    asked.out.mkdir()
    with opened(SearchRequest(ranks=(1, 2, 4)), asked, Listener()) as (advisor, _, _):
        advisor.budget = replace(advisor.budget, nested=True)
        advisor.ask("count")
        advisor.ask("ladder")
    assert [point["rank"] for point in advisor.record["nested"]["points"]] == [1, 2, 4]


def test_a_budget_may_confirm_the_ranks_beside_the_chosen_one(world, rows, tmp_path):
    assert BUDGETS["full"].neighbours
    settings = {**BEGIN, "max_steps": 12, "valid": rows["valid"], "test": rows["test"]}
    asked = request(world / "llama", rows["train"], tmp_path / "s", **settings)
    asked.out.mkdir()
    with opened(SearchRequest(ranks=(1, 2, 4, 8)), asked, Listener()) as (advisor, _, _):
        advisor.budget = replace(advisor.budget, neighbours=True, confirm_seeds=2)
        advisor.ask("count")
        advisor.ask("ladder")
        advisor.record["ladder"]["best"] = 8
        advisor.spec = advisor.spec.model_copy(update={"rank": 2})
        advisor.ask("confirm")
        confirm = advisor.record["confirm"]
        study, steps = advisor.trials.study, advisor.trials.steps(1.0)
        study.keep(
            Trial(advisor.candidate(4), advisor.trials.loop.seed + 1, steps), "confirm", Found("diverged", 0.0, ())
        )
        advisor.spec = advisor.spec.model_copy(update={"rank": 2})
        advisor.ask("confirm")
    again = advisor.record["confirm"]
    assert again["failed"] == [4]
    assert [point["rank"] for point in again["points"]] == [1, 2, 8]
    assert [point["rank"] for point in confirm["points"]] == [1, 2, 4, 8]
    assert confirm["failed"] == []
    verdicts = {point["rank"]: point["verdict"] for point in confirm["points"]}
    assert verdicts[8] == "best"
    assert verdicts[2] == confirm["verdict"] != "alone"
    assert advisor.spec.rank == (2 if confirm["verdict"] == "not worse" else 8)


def test_the_recommendation_is_one_of_what_was_confirmed(found):
    told = found["recommendation"]
    assert told["kind"] in ("recommended", "provisional", "cannot tell")
    assert told["rank"] in [point["rank"] for point in found["confirm"]["points"]]
    assert told["sentence"].startswith(f"Rank {told['rank']}, alpha 8, learning rate ")
    assert told["surer"]


def test_costs_are_counted_in_full_runs(found):
    begun = [trial["share"] for trial in found["trials"] if trial["step"] == "noise"]
    assert sum(begun) == pytest.approx(3 / 4)
    own = [trial["share"] for trial in found["trials"] if trial["step"] == "ladder"]
    tried = found["ladder"]["points"]
    assert own == [1.0] * (len(tried) - 1)  # the rank of the last rung has been trained there
    assert found["cost"]["runs"] == pytest.approx(sum(trial["share"] for trial in found["trials"]), rel=0.1)
    assert found["cost"]["grid"] == 3 * len(found["rate"]["rungs"][0]["points"])


def test_the_adapter_that_is_left_is_the_chosen_one_or_smaller(found):
    adapter = read_adapter(Path(found["out"]) / "adapter")
    assert adapter.parameter_count() == found["ship"]["parameters"]["compressed"]
    ranks = {path: rank for path, rank in found["ship"]["ranks"].items() if rank}
    assert {path: factors.rank for path, factors in adapter.sites.items()} == ranks


def test_its_command_trains_the_same_adapter_again(world, rows, tmp_path):
    found = searched(world, rows, tmp_path / "s", budget="express", train={"seed": 3})
    words = found["recommendation"]["command"].split()
    given = {}
    for name, value in zip(words[2::2], words[3::2], strict=True):
        given[name.removeprefix("--").replace("-", "_")] = value
    given = {name: value for name, value in given.items() if name not in ("model", "data", "out")}
    again = run_training(request(world / "llama", rows["train"], tmp_path / "again", **given), Listener())
    assert again["evaluation"]["adapters"][0]["loss"] == pytest.approx(
        next(p["loss"] for p in found["confirm"]["points"] if p["rank"] == found["recommendation"]["rank"]), rel=1e-5
    )


def test_express_cuts_one_adapter_and_is_provisional(world, rows, tmp_path):
    found = searched(world, rows, tmp_path / "s", budget="express")
    assert found["ladder"] is None
    assert [point["rank"] for point in found["truncation"]["points"]] == [1, 2, 4]
    assert found["recommendation"]["kind"] in ("provisional", "cannot tell")
    assert found["cost"]["runs"] < 5.5


class Killer(Listener):
    """Sends SIGTERM when a pack of a step is half trained; or, of work that is no pack, when half of it is done."""

    def __init__(self, step, *, pack=True):
        super().__init__()
        self.step, self.pack = step, pack

    def stage(self, title):
        inner = super().stage(title)
        if not title.startswith(f"{self.step}:") or (" steps, seed " in title) != self.pack:
            return inner
        killer = self

        class Stage:
            def __enter__(self):
                advance = inner.__enter__()

                def told(share):
                    advance(share)
                    if share >= 0.5 and killer.step:
                        killer.step = None
                        os.kill(os.getpid(), signal.SIGTERM)

                return told

            def __exit__(self, *error):
                return inner.__exit__(*error)

        return Stage()


@pytest.mark.parametrize(("step", "pack"), [("rate", True), ("ladder", False), ("ship", True)])
def test_killed_and_resumed_it_ends_with_the_same_answers(world, rows, tmp_path, found, step, pack):
    with pytest.raises(Interrupted) as heard:
        searched(world, rows, tmp_path / "s", Killer(step, pack=pack), also=("form=dora",))
    assert "--resume" in heard.value.way_on
    again = searched(world, rows, tmp_path / "s", also=("form=dora",), train={"resume": True})
    for name in found.keys() - {*CHANGES, "cost", "trials", "recommendation"}:
        assert again[name] == found[name], name
    assert again["recommendation"]["sentence"] == found["recommendation"]["sentence"]


class Early(Listener):
    """Sends SIGTERM as soon as something is done."""

    def stage(self, title):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().stage(title)


def test_stopped_before_its_first_trial_it_says_to_begin_again(world, rows, tmp_path):
    with pytest.raises(Interrupted) as heard:
        searched(world, rows, tmp_path / "s", Early())
    assert "Begin again with" in heard.value.way_on
    assert "--resume" not in heard.value.way_on
    assert searched(world, rows, tmp_path / "s", until="count")["count"]["ranks"] == [1, 2, 4]


def test_it_stops_where_it_is_told_to_and_goes_on_from_there(world, rows, tmp_path, found):
    first = searched(world, rows, tmp_path / "s", until="noise")
    assert first["noise"] == found["noise"]
    assert first["rate"] is None
    assert first["recommendation"] is None
    then = searched(world, rows, tmp_path / "s", until="rate", train={"resume": True})
    assert then["rate"] == found["rate"]


def test_where_nothing_is_learnt_no_rate_is_dropped_and_none_is_tried_beyond(world, rows, tmp_path):
    found = searched(world, rows, tmp_path / "s", until="rate", train={"lr": 1e-20})["rate"]
    assert [[point["kept"] for point in rung["points"]] for rung in found["rungs"]] == [[True] * 6] * 3
    assert found["interior"] is False


def test_where_documents_are_learnt_by_heart_lower_rates_are_tried(world, rows, tmp_path):
    """None is better than the base on documents of another kind, and it is not for want of learning."""
    other = tmp_path / "other.jsonl"
    kinds = [{"prompt": f"{word} {word}", "completion": word[::-1] * 3} for word in ("quick", "brown", "fox", "lazy")]
    other.write_text("".join(json.dumps(row) + "\n" for row in 6 * kinds), encoding="utf-8")
    own = {"valid": str(other), "test": str(other), "max_steps": 24}
    found = searched(world, rows, tmp_path / "s", until="rate", train=own)["rate"]
    assert min(point["lr"] for point in found["rungs"][-1]["points"]) < BEGIN["lr"] / 4
    assert [point["kept"] for point in found["rungs"][0]["points"]].count(True) < 6


def test_without_files_to_judge_by_a_quarter_is_held_back_in_halves(world, rows, tmp_path):
    found = searched(world, rows, tmp_path / "s", until="count", train={"valid": None, "test": None})
    counts = {name: part["documents"] for name, part in found["data"].items()}
    assert counts == {"train": 30, "choose": 5, "confirm": 5}


def test_ranks_by_layer_are_tried_where_they_are_asked_for_and_stand_in_the_command(world, rows, tmp_path):
    settings = {"rank": 4, "max_steps": 16}
    same = {"budget": "express", "ranks": "4", "train": settings}
    found = searched(world, rows, tmp_path / "s", allocate="gradients", **same)
    told, pattern = found["allocation"], found["recommendation"]["rank_pattern"]
    assert "--allocate gradients" in found["command"]
    assert told["sentence"] in found["recommendation"]["sentence"]
    assert bool(pattern) == (told["verdict"] == "recommended")
    words = found["recommendation"]["command"].split()
    assert words.count("--rank-pattern") == len(pattern)
    assert [trial["step"] for trial in found["trials"]].count("allocation") == (5 if told["points"] else 0)
    with pytest.raises(Interrupted):
        searched(world, rows, tmp_path / "t", Killer("allocation"), allocate="gradients", **same)
    same["train"] = settings | {"resume": True}
    again = searched(world, rows, tmp_path / "t", allocate="gradients", **same)
    assert (again["allocation"], again["ship"]) == (told, found["ship"])


def test_the_command_of_ranks_by_layer_trains_that_very_adapter(world, rows, tmp_path):
    settings = {**BEGIN, "max_steps": 12, "valid": rows["valid"], "test": rows["test"]}
    asked = request(world / "llama", rows["train"], tmp_path / "s", **settings)
    asked.out.mkdir()
    ranks = {"model.layers.0.self_attn.q_proj": 7, "model.layers.1.mlp.down_proj": 2}
    with opened(SearchRequest(), asked, Listener()) as (advisor, whole, _):
        advisor.spec = patterned(advisor.spec, ranks)
        ((found,),) = advisor.trials.confirmed("confirm", [advisor.candidate()], [0])
        loss = found.confirm.sum() / advisor.trials.items("confirm").sum()
        words = shlex.split(winner(advisor, whole))
    names = [word.removeprefix("--").replace("-", "_") for word in words[2::2]]
    pairs = list(zip(names, words[3::2], strict=True))
    given = {name: value for name, value in pairs if name not in ("model", "data", "out", "rank_pattern")}
    given["rank_pattern"] = [value for name, value in pairs if name == "rank_pattern"]
    again = run_training(request(world / "llama", rows["train"], tmp_path / "again", **given), Listener())
    assert again["evaluation"]["adapters"][0]["loss"] == pytest.approx(loss, rel=1e-5)
    trained = {path: factors.rank for path, factors in read_adapter(tmp_path / "again").sites.items()}
    assert {path: rank for path, rank in trained.items() if rank != 4} == ranks


@pytest.mark.parametrize("task", BASES)
def test_every_task_is_searched_for(tmp_path, task):
    """Heads that are fresh, pictures, masks that are drawn anew, sequences to sequences."""
    files = write_task(tmp_path / "files", task)
    settings = {**BEGIN, "max_steps": 20, "batch_documents": 8, "batch_tokens": None, "dtype": "float32"}
    asked = request(**files, out=tmp_path / "s", task=task, device="cpu", **settings)
    found = run_search(SearchRequest(budget="express", ranks="1,4"), asked, Listener())
    assert found["task"] == task
    assert found["confirm"]["points"][0]["loss"] < found["count"]["base"]["confirm"]
    assert read_adapter(Path(found["out"]) / "adapter").parameter_count() == found["ship"]["parameters"]["compressed"]


REFUSED = {
    "full": ({"train": {"form": "full", "rank": None, "alpha": None}}, SpecError, "for fresh adapters"),
    "ranks given out twice": (
        {"allocate": "gradients", "train": {"form": "adalora"}},
        SpecError,
        "gives the ranks out",
    ),
    "ranks by another start": ({"allocate": "activations", "train": {"init": "eva"}}, SpecError, "init eva looks for"),
    "ranks of another task": ({"allocate": "gradients", "train": {"task": "seq2seq"}}, SpecError, "task is seq2seq"),
    "patterns": ({"train": {"rank_pattern": {"q_proj": 2}}}, SpecError, "a search finds ranks"),
    "express of another form": ({"budget": "express", "train": {"form": "dora"}}, SpecError, "cuts one adapter"),
    "no setting": ({"also": ("dora",)}, SpecError, "expected setting=value"),
    "no other": ({"also": ("form=lora",)}, SpecError, "no other candidate"),
    "unknown": ({"also": ("fromm=dora",)}, SpecError, "did you mean"),
    "budget": ({"budget": "huge"}, SpecError, "budget = 'huge'"),
    "ranks": ({"ranks": "4,x"}, SpecError, "ranks"),
    "nothing to resume": ({"train": {"resume": True}}, RunFolderError, "no search to resume"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_a_sentence(world, rows, tmp_path, name):
    own, error, said = REFUSED[name]
    with pytest.raises(error, match=said):
        searched(world, rows, tmp_path / "s", **own)


def test_a_folder_with_a_search_in_it_is_not_begun_anew(world, rows, tmp_path):
    searched(world, rows, tmp_path / "s", until="count")
    with pytest.raises(RunFolderError, match="--resume goes on with it"):
        searched(world, rows, tmp_path / "s", until="count")
    with pytest.raises(RunFolderError, match="shared settings differ"):
        searched(world, rows, tmp_path / "s", until="count", train={"resume": True, "batch_tokens": 200})


def test_documents_that_are_too_few_are_told(world, rows, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", range(900, 903))
    with pytest.raises(DataError, match="an interval needs two"):
        searched(world, rows, tmp_path / "s", train={"valid": str(few), "test": None})
