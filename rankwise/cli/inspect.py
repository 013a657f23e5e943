"""`rankwise inspect`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rankwise.cli.console import print_json
from rankwise.cli.options import Json


def inspect(
    what: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="An adapter's folder, or a model's folder or id.")],
    task: Annotated[
        str | None, typer.Option(help="Of a model: what it is to be loaded for [as it was made].", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Show what an adapter changes, or what a model offers.

    Of an adapter: sites, ranks, scales, the size of each change and the base it expects.  Of a model: the layers that
    can be adapted.

    Examples:
      rankwise inspect runs/chats
      rankwise inspect ./SmolLM2-135M-Instruct
    """
    from rankwise.jobs.inspect import run_inspection

    found = run_inspection(what, task)
    if json:
        print_json(found)
    elif found["kind"] == "adapter":
        _show_adapter(found)
    else:
        _show_model(found)


def _show_adapter(found: dict[str, Any]) -> None:
    spec, base = found["spec"], found["base"]
    print(f"{found['path']}: {found['parameters']:,} parameters, {spec['form']}, {spec['scaling']}")
    if found["nested"]:
        print(f"nested: any rank up to {found['nested'][-1]}, trained at {', '.join(map(str, found['nested']))}")
    if found["classes"]:
        print(f"{found['task']}: {', '.join(found['classes'])}")
    mark = f"fingerprint {base['fingerprint'][:12]}…" if base and base["fingerprint"] else "no fingerprint"
    print(f"base: {base['name']} ({mark})" if base else "base: not recorded")
    if found["changes_nothing"]:
        print("warning: ΔW is zero at every site; this adapter changes nothing")
    width = max((len(path) for path in found["sites"]), default=4)
    print(f"{'site':{width}}  rank     scale      ‖ΔW‖")
    for path, site in found["sites"].items():
        print(f"{path:{width}}  {site['rank']:4d}  {site['scale']:8.4g}  {_norm(site['delta_norm']):>8}")
    for path in found["modules"]:
        print(f"{path:{width}}  trained whole")
    for path, tokens in found["tokens"].items():
        print(f"{path:{width}}  rows of tokens {', '.join(map(str, tokens))}")


def _norm(found: float | None) -> str:
    return "–" if found is None else f"{found:.4g}"


def _show_model(found: dict[str, Any]) -> None:
    print(f"{found['path']}: {found['architecture']}, {found['parameters']:,} parameters")
    if "trained" in found:
        base = found["trained"]["base"]
        print(f"all weights trained, from {base['name']} (fingerprint {base['fingerprint'][:12]}…)")
    for name, preset in found["presets"].items():
        print(
            f"{name:11} {preset['sites']:4d} layers, {preset['parameters_per_rank']:9,} parameters per rank: "
            f"{', '.join(preset['layers'])}"
        )
