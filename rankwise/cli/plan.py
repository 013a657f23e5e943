"""`rankwise plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.console import print_json
from rankwise.cli.options import Json, Model

_PARTS = ("weights", "adapters", "gradients", "optimiser", "activations", "working", "process")


def _option(help_text: str, **settings: Any) -> Any:
    return typer.Option(help=help_text, show_default=False, **settings)


def plan(
    model: Model,
    method: Annotated[str | None, _option("full, lora, dora, adalora or qlora [lora].")] = None,
    storage: Annotated[str | None, _option("How the base is held: dense, int8 or nf4 [by method].")] = None,
    rank: Annotated[int | None, _option("Rank [16].")] = None,
    targets: Annotated[
        str | None, _option("minimal, attention, mlp, all-linear, names with commas, or re:PATTERN [all-linear].")
    ] = None,
    exclude: Annotated[str | None, _option("Layers left out of these; said alike [none].")] = None,
    layers: Annotated[str | None, _option("Blocks by number, such as 0-11,20 or 16- [all].")] = None,
    rank_pattern: Annotated[list[str] | None, _option("Other ranks; may be repeated.", metavar="NAME=RANK")] = None,
    dropout: Annotated[float | None, _option("Dropout of the adapter's input [0].")] = None,
    batch_tokens: Annotated[int | None, _option("Tokens of one optimiser step [4096].")] = None,
    micro_tokens: Annotated[int | None, _option("Tokens at once [by device].")] = None,
    document_tokens: Annotated[int | None, _option("Tokens of a usual document [512].")] = None,
    supervised: Annotated[float | None, _option("Share of the tokens whose loss counts [1].")] = None,
    context: Annotated[int | None, _option("Tokens read and written when it answers [2048].")] = None,
    checkpointing: Annotated[bool | None, typer.Option("--checkpointing", help="Compute blocks twice.")] = None,
    dtype: Annotated[str | None, _option("auto, bfloat16, float16 or float32 [auto].")] = None,
    device: Annotated[str | None, _option("auto, cpu or cuda [auto].")] = None,
    memory: Annotated[str | None, _option("What there is, such as 24GiB: proposes what fits.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run two real steps and compare.")] = False,
    json: Json = False,
) -> None:
    """Show what training takes in memory before it is spent.

    Exact from the shapes in config.json or in the headers of the weights; the weights themselves are not read.

    Examples:
      rankwise plan --model ./SmolLM2-135M-Instruct --batch-tokens 2048 --measure
      rankwise plan --model ./llama-7b/config.json --device cuda --memory 24GiB
    """
    given = {name: value for name, value in locals().items() if value is not None}
    own = {name: value for name, value in given.items() if name not in ("model", "memory", "measure", "json")}
    from rankwise.planning.plan import plan as planned

    found = planned(model, memory=memory, **own)
    if measure:
        from rankwise.jobs.plan import measured

        found["measured"] = measured(Path(model).expanduser(), own)
    if json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rankwise.planning.amounts import shown

    asked, memory, machine = found["settings"], found["memory"], found["machine"]
    print(f"{found['model']}: {found['parameters']:,} parameters, from {found['source']}")
    named = {name: _named(asked[name]) for name in ("targets", "exclude", "layers")}
    fewer = [f"{words} {named[name]}" for name, words in (("exclude", "without"), ("layers", "blocks")) if named[name]]
    ranks = (f"rank {asked['rank']}", *(f"{name}={rank}" for name, rank in asked["rank_pattern"].items()))
    what = (asked["method"], asked["storage"], *ranks, named["targets"], *fewer)
    print(f"{', '.join(what)}, {machine['dtype']} on {machine['device']}")
    for part in _PARTS:
        print(f"  {part:12} {shown(memory[part]):>9}")
    print(f"  {'peak':12} {shown(memory['peak']):>9}   (logits at once: {shown(memory['loss_chunk'])})")
    print(f"  without checkpointing {shown(found['without_checkpointing'])}, with {shown(found['with_checkpointing'])}")
    answering = found["inference"]
    print(f"  answering {asked['context']} tokens {shown(answering['peak'])}")
    _show_methods(found["methods"], shown)
    _show_guide(found["guide"], shown)
    if found["proposal"] is not None:
        _show_proposal(found["proposal"], shown)
    if "measured" in found:
        _show_measured(found["measured"], shown)
    for note in found["notes"]:
        print(f"note: {note}")


def _named(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def _show_methods(methods: list[dict[str, Any]], shown: Any) -> None:
    columns = ("weights", "adapters", "gradients", "optimiser", "activations", "peak")
    print(f"\n{'':15}" + "".join(f"{name:>12}" for name in columns))
    for one in methods:
        print(f"{one['name']:15}" + "".join(f"{shown(one[name]):>12}" for name in columns))


def _show_guide(rows: list[dict[str, Any]], shown: Any) -> None:
    print("\nThe usual table, for 7 × 10⁹ parameters, and its rule for this model:")
    for row in rows:
        print(f"  {row['name']:15} ~{shown(row['told'])}; here {shown(row['by_rule'])}: {row['rule']}")
        print(f"  {'':15} but: {row['wrong']}")


def _show_proposal(proposal: dict[str, Any], shown: Any) -> None:
    changes = ", ".join(f"{name} {value}" for name, value in proposal["settings"].items()) or "as asked for"
    verdict = "fits" if proposal["fits"] else "nothing found that fits"
    print(f"\nin {shown(proposal['memory'])}: {verdict}: {changes}: {shown(proposal['peak'])}")
    for reason in proposal["why"]:
        print(f"  {reason}")


def _show_measured(measured: dict[str, Any], shown: Any) -> None:
    print(
        f"\npredicted {shown(measured['predicted'])}, measured {shown(measured['peak'])} "
        f"({measured['predicted'] / measured['peak'] - 1:+.1%}); the process alone {shown(measured['process'])}"
    )
