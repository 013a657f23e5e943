"""`rankwise plan` for people and for machines, against real steps, and without torch."""

import json
import subprocess
import sys
import time

import pytest

from tests.planning.test_plan import SEVEN

SEVENTY = SEVEN | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.fixture
def seventy(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SEVENTY))
    return path


def test_plan_for_machines_and_for_people(rankwise, world):
    line = ["plan", "--model", world / "llama", "--device", "cpu", "--dtype", "float32", "--memory", "16GiB"]
    found = rankwise(*line, "--json")
    assert (found.code, found.err) == (0, "")
    assert found.json["proposal"]["fits"]
    assert found.json["source"] == "the headers of its safetensors files"
    shown = rankwise(*line)
    assert (shown.code, shown.err) == (0, "")
    for piece in (
        f"{found.json['parameters']:,} parameters",
        "activations",
        "QLoRA, nf4",
        "~112 GB",
        "in 17.2 GB: fits: as asked for",
        "note: ",
    ):
        assert piece in shown.out


def test_fewer_layers_take_less(rankwise, world):
    line = ["plan", "--model", world / "llama", "--device", "cpu", "--dtype", "float32", "--json"]
    whole = rankwise(*line).json
    half = rankwise(*line, "--layers", 1, "--exclude", "re:.*up_proj").json
    assert half["memory"]["adapters"] < whole["memory"]["adapters"] / 2
    assert half["memory"]["activations"] < whole["memory"]["activations"]
    shown = rankwise(*line[:-1], "--layers", "1-", "--exclude", "up_proj").out
    assert "rank 16, all-linear, without up_proj, blocks 1-, float32 on cpu" in shown


def test_other_ranks_of_single_layers_are_said_as_in_train_and_are_counted(rankwise, world):
    """Of every layer twice: rank 16 costs 16 × (in + out), and q_proj is 32 × 32."""
    line = ["plan", "--model", world / "llama", "--device", "cpu", "--dtype", "float32", "--json"]
    alike = rankwise(*line).json
    other = rankwise(*line, "--rank-pattern", "q_proj=4", "--rank-pattern", r"layers\.1\.mlp\.up_proj=20").json
    fewer, more = 2 * (16 - 4) * (32 + 32), (20 - 16) * (32 + 48)
    assert alike["memory"]["adapters"] - other["memory"]["adapters"] == 4 * (fewer - more)
    assert other["settings"]["rank_pattern"] == {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 20}
    shown = rankwise(*line[:-1], "--rank-pattern", "q_proj=4").out
    assert "rank 16, q_proj=4, all-linear" in shown


def test_a_70b_config_takes_no_second_and_no_torch(seventy):
    script = (
        "import sys, time; sys.argv = ['rankwise', 'plan', '--model', sys.argv[1], '--device', 'cuda', '--memory', "
        "'80GiB', '--json']\n"
        "from rankwise.cli.app import main\nbegun = time.process_time()\n"
        "try: main()\nexcept SystemExit as done: assert not done.code\n"
        "print(time.process_time() - begun, sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(seventy)], capture_output=True, text=True, check=True)
    seconds, _, loaded = done.stderr.strip().partition(" ")
    assert loaded == "[]"
    assert float(seconds) < 1
    found = json.loads(done.stdout)
    assert found["parameters"] == 68_976_648_192  # Llama 2 70B's
    assert found["proposal"]["settings"]["storage"] in ("int8", "nf4")


def test_measured_against_predicted(rankwise, world):
    line = ["plan", "--model", world / "llama", "--device", "cpu", "--dtype", "float32", "--batch-tokens", 256]
    begun = time.perf_counter()
    ran = rankwise(*line, "--document-tokens", 64, "--measure", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert time.perf_counter() - begun < 120
    found = ran.json["measured"]
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.1)
    assert found["process"] < found["peak"]


MISTAKES = {
    "no model": (["--model", "./none"], "no such folder"),
    "amount": (["--memory", "lots"], "'lots' is no amount"),
    "method": (["--method", "lorra"], "method = 'lorra'"),
    "targets": (["--targets", "q_porj"], "'q_porj' matches no layer; did you mean 'q_proj'?"),
    "ranks": (["--rank-pattern", "q_proj"], "expected PATTERN=NUMBER, such as q_proj=8"),
    "rank": (["--rank-pattern", "q_proj=many"], "rank_pattern.q_proj = 'many'"),
    "ranks of none": (["--rank-pattern", "q_porj=4"], "q_porj"),
    "blocks": (["--layers", "5"], "layers 5: none of the targeted layers"),
    "full in codes": (["--method", "full", "--storage", "nf4"], "weights in 8 or 4 bits are not trained themselves"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence_and_a_way_out(rankwise, world, name):
    options, said = MISTAKES[name]
    ran = rankwise("plan", *(["--model", world / "llama"] if "--model" not in options else []), *options)
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_config_alone_cannot_be_measured(rankwise, seventy):
    ran = rankwise("plan", "--model", seventy, "--measure")
    assert (ran.code, "local folder" in ran.err) == (1, True)


def test_training_says_what_it_expects_first_and_what_it_took_last(rankwise, world, tmp_path):
    line = ["train", "--model", world / "llama", "--data", world / "train.jsonl", "--out", tmp_path / "out"]
    ran = rankwise(*line, "--max-steps", 1, "--batch-tokens", 300, "--dtype", "float32")
    assert ran.code == 0
    first, last = ran.err.index("at most expected: weights"), ran.err.index("were expected)")
    assert first < ran.err.index("step 1: loss") < last
    record = json.loads((tmp_path / "out" / "rankwise.json").read_text())
    expected, took = (record["training"][f"{name}_memory_bytes"] for name in ("predicted", "peak"))
    assert expected > 0
    assert took > 0
