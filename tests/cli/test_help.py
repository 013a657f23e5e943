import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from rankwise.cli.app import app
from rankwise.jobs.defaults import BY_TASK

COMMAND = shutil.which("rankwise", path=Path(sys.executable).parent)
VERBS = get_command(app).commands
TRAIN = (
    "--model --data --valid --out --rank --alpha --targets --scaling --dropout --lr --epochs --max-steps "
    "--batch-tokens --max-length --seed --resume --continue-from --config --json"
)
PROMISED = {  # what others script against
    "quickstart": "--model --out --json",
    "search": "--model --data --valid --test --out --budget --ranks --also --pack --until --resume --config --json",
    "train": TRAIN,
    "evaluate": "--model --adapter --data --json",
    "chat": "--model --adapter --json",
    "serve": "--model --adapter --adapters-dir --host --port --api-key --max-loaded --max-batch-tokens --merge --json",
    "merge": "--model --adapter --out --json",
    "combine": "ADAPTER --model --out --method --weights --rank --density --seed --data --force --json",
    "compress": "ADAPTER --model --data --out --tolerance --worth --max-length --seed --json",
    "convert": "SOURCE --out --to --for --model --component --dtype --alpha --enable-lora --rank --json",
    "inspect": "DIR|MODEL --json",
    "plan": "--model --method --rank --rank-pattern --targets --batch-tokens --memory --measure --json",
    "doctor": "--json",
}


def test_the_list_of_verbs_says_of_each_what_it_does_in_a_whole_sentence(rankwise):
    shown = rankwise("--help")
    assert shown.code == 0
    assert shown.err == ""
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", shown.out.split("Commands:")[1], re.M))
    assert set(PROMISED) <= listed.keys() == VERBS.keys()
    for sentence in listed.values():
        assert sentence.endswith(".")
        assert not sentence.endswith("...")
        assert len(sentence) <= 60


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_names_every_promised_option(rankwise, verb):
    shown = rankwise(verb, "--help")
    assert shown.code == 0
    assert shown.err == ""
    options = shown.out.split("Example")[1]
    for option in [*PROMISED[verb].split(), "--json"]:
        assert re.search(rf"^  {re.escape(option)}\b", options, re.M), option


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_stand_on_lines_of_their_own_and_can_be_typed_as_they_are(rankwise, verb):
    shown = rankwise(verb, "--help").out
    examples = re.findall(rf"^    (rankwise {verb}.*)$", shown, re.M)
    assert examples
    for example in examples:
        with VERBS[verb].make_context(verb, shlex.split(example)[2:]) as context:
            assert context.params


@pytest.mark.parametrize("verb", ["train", "evaluate", "compress"])
def test_how_long_a_document_may_be_by_itself_is_said_of_every_task(rankwise, verb):
    said = " ".join(rankwise(verb, "--help").out.split())
    of_texts = {task: dict(BY_TASK[task]).get("max_length", (2048,))[0] for task in BY_TASK if "image" not in task}
    assert {task: length for task, length in of_texts.items() if length != 512} == {"causal-lm": 2048}
    assert "2048; 512 for encoders and seq2seq]" in said


def test_lora_plus_says_what_becomes_of_magnitudes(rankwise):
    said = " ".join(rankwise("train", "--help").out.split())
    assert "LoRA+: B, and the magnitudes of form dora, learn at so many times --lr [1]." in said


def test_without_a_verb_there_is_help_and_a_code_that_says_nothing_was_done(rankwise):
    shown = rankwise()
    assert shown.code == 2
    assert "Commands:" in shown.out + shown.err


# ── starts at once ───────────────────────────────────────────────────────────────────────────────────────────────────


def best_of_five(*command: str) -> float:
    """The best: what a process takes when nobody else is in its way."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begun)
    return min(times)


def test_help_takes_less_than_a_third_of_a_second():
    assert best_of_five(COMMAND, "--help") <= 0.3


def test_the_import_takes_less_than_a_fifth_of_a_second():
    assert best_of_five(sys.executable, "-c", "import rankwise") <= 0.2


@pytest.mark.parametrize(
    "script",
    [
        "import rankwise",
        "import rankwise; dir(rankwise)",
        "import rankwise.cli.app",
        "import sys; sys.argv = ['rankwise', 'train', '--help']\nfrom rankwise.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_loaded_before_there_is_work(script):
    heavy = "{'torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'rankwise.jobs'}"
    told = f"{script}\nimport sys; print(sorted({heavy} & sys.modules.keys()), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stderr == "[]\n"
