"""What `rankwise combine` prints, and that what it prints can be typed."""

import shlex

import pytest

from tests.jobs.world import read, write_adapter


@pytest.fixture(scope="module")
def two(world):
    settings = {"targets": ("q_proj", "v_proj"), "dropout": 0.0}
    one = write_adapter(world / "chats", world / "llama", rank=4, **settings)
    return one, write_adapter(world / "code", world / "llama", size=0.2, rank=2, **settings)


def test_people_read_what_was_made_what_was_chosen_and_what_is_lost(rankwise, world, two, tmp_path):
    out = tmp_path / "out"
    ran = rankwise("combine", *two, "--model", world / "llama", "--method", "svd", "--weights", "1,-0.5", "--out", out)
    assert ran.code == 0, ran.err
    first, made, size, chosen, lost, measured, *commands, unseen = ran.out.splitlines()
    assert first == f"{out}: svd of 1 × chats - 0.5 × code"
    assert made == "the sum of all changes, cut to the rank that comes nearest"
    record = read(out / "rankwise.json")
    assert size == f"4 layers, rank 4, {record['parameters']:,} parameters"
    assert chosen == "chosen: rank the largest of the adapters', layer by layer"
    worst = max(record["combination"]["errors"].items(), key=lambda pair: pair[1])
    assert lost == (
        f"cut to these ranks, ΔW is off by {record['combination']['error']:.2%} of its norm; "
        f"most at {worst[0]}, {worst[1]:.2%}"
    )
    assert measured == "what each task loses, measured on documents that none of them was trained on:"
    adapters = f"--adapter {two[0]} --adapter {two[1]} --adapter {out}"
    assert commands == [f"  rankwise evaluate --model {world / 'llama'} --data UNSEEN {adapters}"]
    assert unseen == "UNSEEN is for you to name: what chats and code could be measured on is not recorded"


def test_a_weight_may_be_negative_from_its_first_sign_on_and_json_is_all_there_is(rankwise, world, two, tmp_path):
    out, own = tmp_path / "out", ("--model", world / "llama", "--json")
    ran = rankwise("combine", *two, *own, "--weights", "-1,0.5", "--out", out)
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["weights"] == {"chats": -1, "code": 0.5}
    again = shlex.split(read(out / "rankwise.json")["command"])[1:]
    again[again.index("--out") + 1] = tmp_path / "again"
    assert rankwise(*again).code == 0
    assert read(tmp_path / "again" / "rankwise.json")["digest"] == read(out / "rankwise.json")["digest"]


def test_with_documents_it_is_measured_at_once_and_the_printed_command_says_the_same(rankwise, world, two, tmp_path):
    line = ("--model", world / "llama", "--out", tmp_path / "out", "--data", world / "test.jsonl")
    ran = rankwise("combine", *two, *line, "--dtype", "float32")
    assert ran.code == 0, ran.err
    name, *rows = ran.out.splitlines()[:5]
    assert name == f"{world / 'test.jsonl'}:"
    adapters = [word for folder in (*two, tmp_path / "out") for word in ("--adapter", folder)]
    own = ("--model", world / "llama", "--data", world / "test.jsonl", "--dtype", "float32")
    assert rankwise("evaluate", *own, *adapters).out.splitlines() == rows
    assert [row.split()[0] for row in rows] == ["base", "chats", "code", "out"]


@pytest.mark.filterwarnings("default::rankwise.errors.RankwiseWarning")
def test_linear_warns_under_its_own_name(rankwise, world, two, tmp_path):
    own = ("--model", world / "llama", "--method", "linear")
    ran = rankwise("combine", two[0], two[0], *own, "--out", tmp_path / "out")
    assert "named twice" in ran.err
    three = write_adapter(tmp_path / "three", world / "llama", rank=4, targets=("q_proj", "v_proj"), size=0.1)
    ran = rankwise("combine", two[0], three, *own, "--out", tmp_path / "out")
    assert ran.code == 0
    assert "warning: linear adds up factors: its ΔW differs from the sum" in ran.err
    assert "its ΔW is off the sum by" in ran.out


def test_mistakes_end_in_a_sentence_and_a_way_out(rankwise, world, two, tmp_path):
    own = ("--model", world / "llama", "--out", tmp_path / "out")
    ran = rankwise("combine", *two, *own, "--method", "tie", "--rank", 0)
    assert (ran.code, ran.out) == (1, "")
    assert "did you mean 'ties'" in ran.err
    assert "rank = 0" in ran.err
    assert "one for each, in the same order" in rankwise("combine", *two, *own, "--weights", 1).err
    assert rankwise("combine", *own).code == 2
    assert not (tmp_path / "out").exists()
