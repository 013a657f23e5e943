"""How long `rankwise --help` and `import rankwise` take, as whole processes and without the interpreter's own start.

    python benchmarks/start_up.py [--rounds 15]

Prints one JSON object: medians over rounds, in seconds.  The goals are 0.3 s for the first and 0.2 s for the second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from where import machine

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import": [sys.executable, "-c", "import rankwise"],
    "help": [shutil.which("rankwise", path=Path(sys.executable).parent) or "rankwise", "--help"],
}


def seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = [{name: seconds(command) for name, command in COMMANDS.items()} for _ in range(parser.parse_args().rounds)]
    median = {name: statistics.median(found[name] for found in rounds) for name in COMMANDS}
    loaded = subprocess.run(
        [sys.executable, "-c", "import rankwise, sys; print('torch' in sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    print(
        json.dumps(
            {
                "what": "start-up",
                "seconds": median,
                "import_without_python": median["import"] - median["python"],
                "torch_loaded_by_import": loaded.stdout.strip() == "True",
                "rounds": len(rounds),
                "machine": machine(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
