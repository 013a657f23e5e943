import pytest

from rankwise.reports.reader import read_run
from rankwise.reports.verdict import judge
from tests.reports.folders import evaluation, metrics, record, write_run


def verdict(folder, **parts):
    return judge(read_run(write_run(folder, **parts)))


def test_better_says_by_how_much_and_how_sure(tmp_path):
    found = verdict(tmp_path)
    assert found.kind == "better"
    assert found.sentence == (
        "Tuned is better than the base by 0.419 nats/token (95 % interval 0.373 … 0.461) on 214 unseen documents, "
        "perplexity 11.6 → 7.6; better on 93 % of them."
    )


def test_worse_is_said_as_plainly(tmp_path):
    found = verdict(tmp_path, evaluation=evaluation(shift=0.2))
    assert found.kind == "worse"
    assert found.sentence == (
        "Tuned is worse than the base by 0.191 nats/token (95 % interval 0.149 … 0.237) on 214 unseen documents, "
        "perplexity 11.6 → 14.0; better on 24 % of them."
    )


def test_an_interval_over_zero_is_no_difference(tmp_path):
    found = verdict(tmp_path, evaluation=evaluation(shift=0.0, half=0.05))
    assert found.kind == "unclear"
    assert found.sentence.startswith(
        "No measurable difference between tuned and base on 214 unseen documents: the 95 %"
    )
    assert "includes zero" in found.sentence


@pytest.mark.parametrize(("documents", "kind"), [(1, "unclear"), (5, "unclear"), (6, "better")])
def test_a_handful_of_documents_proves_nothing(tmp_path, documents, kind):
    found = verdict(tmp_path, evaluation=evaluation(documents))
    assert found.kind == kind
    assert found.sentence.startswith("Too few documents to tell") == (kind == "unclear")


def test_few_documents_are_a_caveat(tmp_path):
    caveat, _ = verdict(tmp_path, evaluation=evaluation(20)).caveats
    assert caveat.startswith("With 20 documents the interval itself is uncertain")


def test_an_adapter_that_changes_nothing_makes_no_difference(tmp_path):
    found = evaluation(half=0.0)
    found["per_document"]["adapters"]["tuned"] = found["per_document"]["base"]
    found["adapters"][0] |= {"loss": found["base"]["loss"], "delta": {"mean": 1e-17, "low": 0.0, "high": 0.0}}
    judged = verdict(tmp_path, evaluation=found)
    assert judged.kind == "unclear"
    assert "better on 0 % of them" in judged.sentence


def test_one_of_several_adapters_is_named(tmp_path):
    found = verdict(tmp_path, evaluation=evaluation(names=("r8", "r16")))
    assert found.sentence.startswith("Tuned (r8) is better than the base")


def test_documents_that_chose_the_best_step_are_a_caveat(tmp_path):
    (caveat,) = verdict(tmp_path).caveats
    assert "chose the best of 12 checkpoints" in caveat
    data = record()["data"]
    assert verdict(tmp_path, record=record(data=data | {"test": data["valid"]})).caveats == ()


def test_the_look_before_the_first_step_chose_nothing(tmp_path):
    before = {"kind": "evaluation", "step": 0, "adapter": "tuned", "loss": 3.0, "documents": 214}
    (caveat,) = verdict(tmp_path, metrics=[before, *metrics()]).caveats
    assert "best of 12 checkpoints" in caveat


def test_an_adapter_that_was_trained_before_is_a_caveat(tmp_path):
    settings = [{"name": "continue_from", "value": "runs/first", "reason": "asked for"}]
    assert "trained further" in verdict(tmp_path, record=record(settings=settings)).caveats[1]


@pytest.mark.parametrize("stopped", ["diverged", "not finite"])
def test_a_training_that_went_wrong_is_said_before_anything_else(tmp_path, stopped):
    training = record()["training"] | {"stopped": stopped}
    sentence = verdict(tmp_path, record=record(training=training)).sentence
    assert sentence.startswith("Training was stopped because")
    assert "the adapter is that of step 250. Tuned is better" in sentence


@pytest.mark.parametrize(
    ("stopped", "words"),
    [
        ("interrupted", "training was interrupted after 120 steps"),
        ("diverged", "training was stopped because it diverged after 120 steps"),
        ("not finite", "no longer finite after 120 steps"),
        ("power cut", "training stopped: power cut after 120 steps"),
    ],
)
def test_without_evaluation_nothing_is_claimed(tmp_path, stopped, words):
    training = record()["training"] | {"steps": 120, "stopped": stopped, "skipped_steps": 2}
    found = verdict(tmp_path, record=record(training=training), metrics=metrics(120), evaluation=None)
    assert found.kind == "unmeasured"
    assert found.sentence.startswith("Not compared with the base")
    assert words in found.sentence
    assert "is not known: rankwise train measures" in found.caveats[0]
    assert found.caveats[1] == "Skipped for numbers that were not finite: 2 steps."


def test_totals_alone_are_judged_without_a_share(tmp_path):
    found = evaluation()
    del found["per_document"]
    assert verdict(tmp_path, evaluation=found).sentence.endswith("perplexity 11.6 → 7.6.")
