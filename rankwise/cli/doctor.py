"""`rankwise doctor`."""

from __future__ import annotations

import typer

from rankwise.cli.console import looking_on, print_json
from rankwise.cli.options import Json


def doctor(json: Json = False) -> None:
    """Check the installation and what this machine can do.

    Ends with a run of a few seconds that must learn, be saved, loaded and merged.

    Example:
      rankwise doctor
    """
    with looking_on(json) as watch:
        with watch.stage("checking"):
            from rankwise.jobs.doctor import run_checks

            found = run_checks()
        smoke = found["smoke_run"]
        well = smoke["learns"] and smoke["saves_and_loads"] and smoke["merge_error"] < 0.02
        if json:
            print_json(found | {"well": well})
        else:
            for title in ("versions", "machine", "optional", "products_gflops", "smoke_run"):
                print(title.replace("_", " "))
                for name, value in found[title].items():
                    print(f"  {name:16} {value}")
            print("all well" if well else "something is wrong: see the smoke run above")
    if not well:
        raise typer.Exit(1)
