"""search.json as `rankwise search` writes it, with seeded noise: whole, express, undecided, and stopped early."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tests.reports.folders import HOSTILE

RANKS = (2, 4, 8, 16, 32, 64)
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EACH = 305_280  # parameters for each rank
FULL = 400  # steps
STEPS = (
    "count",
    "noise",
    "rate",
    "targets",
    "ladder",
    "truncation",
    "nested",
    "methods",
    "allocation",
    "confirm",
    "ship",
)


def whole(**changes: Any) -> dict[str, Any]:
    """A standard search that came to a recommendation."""
    return {
        "schema": 1,
        "task": "causal-lm",
        "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "fingerprint": "5f0c" * 16},
        "budget": "standard",
        "machine": {"processor": "AMD EPYC 9R14", "cores": 2, "memory": "23 GB", "bfloat16": True},
        "versions": {"rankwise": "0.1.0", "torch": "2.13.0", "transformers": "5.10.1", "python": "3.11.7"},
        "command": "rankwise search --model SmolLM2 --data train.jsonl --out runs/search --also form=dora",
        "seconds": 9_214.0,
        "data": {
            "train": {"documents": 1912, "tokens": 412_806, "supervised": 38_214},
            "choose": {"documents": 321, "tokens": 68_110, "supervised": 6_402},
            "confirm": {"documents": 322, "tokens": 67_904, "supervised": 6_377},
        },
        "full_run": {"steps": FULL, "tokens": 824_901},
        "count": {
            "targets": "all-linear",
            "parameters_per_rank": EACH,
            "base": {"choose": 2.449, "confirm": 2.461},
            "ranks": list(RANKS),
        },
        "noise": {
            "name": "r 16, 0.0005, all-linear",
            "rank": 16,
            "share": 0.25,
            "losses": [2.1631, 2.1594, 2.1662],
            "deviation": 0.0034,
            "detectable": 0.0158,
            "gain": {"mean": 0.2861, "low": 0.2503, "high": 0.3219},
            "tolerance": 0.00572,
        },
        "rate": _rate(),
        "targets": _targets(),
        "ladder": _ladder(),
        "truncation": _truncation(chosen=16),
        "nested": _nested(),
        "methods": _methods(),
        "allocation": _allocation(),
        "confirm": _confirm(),
        "ship": _ship(),
        "cost": {"runs": 11.75, "trials": 27, "grid": 36.0, "seconds": 8_730.5},
        "trials": _trials(),
        "recommendation": _recommendation(),
    } | changes


def express() -> dict[str, Any]:
    """Without a ladder: one adapter was cut."""
    confirm = _confirm(chosen=16, best=64, seeds=1)
    told = _recommendation(
        kind="provisional",
        rank=16,
        sentence="Rank 16, alpha 32, learning rate 0.0005, all-linear: enough, +0.0016 nats against rank 64",
        surer="--budget standard trains every rank instead of cutting one adapter.",
    )
    left_out = dict.fromkeys(("targets", "ladder", "nested", "methods", "allocation"))
    left_out["ship"] = _ship(control=None, no_control="its budget does not pay for one more full run")
    trials = [trial for trial in _trials() if trial["step"] in ("noise", "rate")]
    trials.append(_trial("r 64, 0.0005, all-linear", "ladder", 0, 1.0, 2.0313))
    cost = {"runs": 4.25, "trials": len(trials), "grid": 30.0, "seconds": 2_940.0}
    return whole(budget="express", confirm=confirm, cost=cost, trials=trials, recommendation=told, **left_out)


def undecided() -> dict[str, Any]:
    """Too few documents: the intervals of smaller ranks are wider than what is allowed, and the best is kept."""
    told = _recommendation(
        kind="cannot tell",
        rank=32,
        sentence="Rank 32, alpha 32, learning rate 0.0005, all-linear: the lowest loss, and whether rank 8 or 16 is "
        "enough cannot be told; 0.420 nats better than the base (95 % 0.380 to 0.461)",
        surer="To tell rank 8 from the best within 0.0084 nats takes about 5 times as many documents.",
        command="rankwise train --model SmolLM2 --data train.jsonl --rank 32 --alpha 32 --lr 5e-4 --out winner",
    )
    confirm = _confirm(chosen=32, verdict="alone")
    return whole(confirm=confirm | {"points": confirm["points"][1:]}, recommendation=told, ladder=_ladder(half=0.02))


def doubted() -> dict[str, Any]:
    """The ladder chose a rank, and new documents leave open whether it is enough."""
    told = _recommendation(
        kind="cannot tell",
        rank=32,
        sentence="Rank 32, alpha 32, learning rate 0.0005, all-linear: whether rank 8 is enough cannot be told",
    )
    return whole(confirm=_confirm(verdict="cannot tell", half=0.021), recommendation=told)


def allocated() -> dict[str, Any]:
    """Ranks by layer are better, and hold; what is trained at the ranks that are left is better than what was cut."""
    ranks = _allocation()["ranks"]
    pattern = {"^" + path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != 8}
    allocation = _allocation("recommended", -0.0121, -0.0098) | {"confirmed": _delta(-0.0103, 0.0044)}
    said = f"Rank 8 given out by layer, alpha 32, learning rate 0.0005, all-linear: enough; {allocation['sentence']}"
    told = _recommendation(sentence=said, rank_pattern=pattern)
    delta = _delta(-0.0067, 0.0031, upper=True)
    control = {"status": "finished", "loss": 2.0394, "delta": delta, "kept": "trained"}
    return whole(allocation=allocation, recommendation=told, ship=_ship(control=control))


def unreliable() -> dict[str, Any]:
    """Halves of the documents disagree about the layers, so that nothing was tried."""
    said = "ranks given out by activations are not reliable and were not tried: those of two halves of the documents "
    told = {"by": "activations", "agreement": 0.41, "verdict": "not reliable", "points": [], "against": None}
    found = whole(allocation=_allocation() | told | {"sentence": f"{said}agree by 0.41 only, 0.8 is the least"})
    found["trials"] = [trial for trial in found["trials"] if trial["step"] != "allocation"]
    return found


def stopped(step: str = "noise") -> dict[str, Any]:
    """Nothing after `step`; as the writer does, without the key of a truncation that never was."""
    later = STEPS[STEPS.index(step) + 1 :]
    trials = [trial for trial in _trials() if trial["step"] not in later]
    cost = {"runs": 0.75, "trials": len(trials), "grid": 6.0, "seconds": 512.0}
    found = whole(cost=cost, trials=trials, recommendation=None, **dict.fromkeys(later))
    return {name: value for name, value in found.items() if name != "truncation" or value is not None}


def hostile() -> dict[str, Any]:
    """Markup wherever a name or a text may be."""
    found = whole(command=f"rankwise search {HOSTILE}", model={"name": HOSTILE, "fingerprint": HOSTILE})
    found |= {"machine": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}, "budget": HOSTILE, "task": HOSTILE}
    found["recommendation"] |= dict.fromkeys(("sentence", "surer", "command", "targets"), HOSTILE)
    found["noise"]["name"] = found["count"]["targets"] = HOSTILE
    found["methods"]["points"][0] |= {"name": HOSTILE, "status": HOSTILE}
    for name in ("best", "chosen"):
        found["targets"][name] = HOSTILE
    found["targets"]["points"][2] |= {"targets": HOSTILE, "status": HOSTILE}
    found["trials"][0] |= {"name": HOSTILE, "status": HOSTILE}
    found["ship"]["ranks"] |= {f"model.layers.0.{HOSTILE}": 4, HOSTILE: 3}
    return found


def write_search(folder: Path, found: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return folder


def _delta(mean: float, half: float, *, upper: bool = False) -> dict[str, float]:
    delta = {"mean": mean, "low": mean - half, "high": mean + half}
    return delta | {"upper": mean + 0.84 * half} if upper else delta


def _rate() -> dict[str, Any]:
    rungs = []
    levels = {0.125: (2.352, 2.298, 2.251, 2.243, 2.301), 0.25: (2.241, 2.1985, 2.163, 2.1684)}
    for share, losses in levels.items():
        best, rates = min(losses), RATES if share == 0.125 else RATES[:4]
        points = []
        for lr, loss in zip(rates, (*losses, None), strict=False):
            status = "diverged" if loss is None else "finished"
            delta = None if loss in (None, best) else _delta(loss - best, 0.011)
            kept = loss in sorted(losses)[: 3 if share == 0.125 else 2]
            points.append({"lr": lr, "status": status, "loss": loss, "delta": delta, "kept": kept})
        rungs.append({"share": share, "points": points})
    return {"rank": 16, "best": 5e-4, "interior": True, "alike": [5e-4, 1e-3], "rungs": rungs}


def _targets() -> dict[str, Any]:
    rows = (("attention", 44, 0.0312, "worse"), ("mlp", 24, 0.0071, "cannot tell"), ("all-linear", 16, None, "best"))
    points = [
        {"targets": name, "rank": rank, "parameters": 16 * EACH + rank, "status": "finished"}
        | {"loss": 2.163 + (mean or 0.0), "delta": None if mean is None else _delta(mean, 0.0104), "verdict": verdict}
        for name, rank, mean, verdict in rows
    ]
    return {"best": "all-linear", "chosen": "all-linear", "points": points}


def _ladder(half: float = 0.0061) -> dict[str, Any]:
    means = {2: 0.0331, 4: 0.0142, 8: 0.0018, 16: 0.0007, 32: None, 64: 0.0011}
    verdicts = {2: "worse", 4: "worse", 32: "best"}
    shares = (0.0, 0.02, 0.87, 0.08, 0.03, 0.0) if half < 0.01 else (0.0, 0.02, 0.21, 0.26, 0.41, 0.1)
    often = dict(zip(RANKS, shares, strict=True))
    points = [
        {"rank": rank, "parameters": rank * EACH, "status": "finished", "loss": 2.0297 + (mean or 0.0)}
        | {"delta": None if mean is None else _delta(mean, half, upper=True)}
        | {"verdict": verdicts.get(rank, "not worse" if half < 0.01 else "cannot tell"), "chosen_in": often[rank]}
        for rank, mean in means.items()
    ]
    return {"best": 32, "chosen": 8 if half < 0.01 else 32, "tolerance": 0.0084, "seeds": 1, "points": points}


def _truncation(chosen: int | None) -> dict[str, Any]:
    means = dict(zip(RANKS, (0.1912, 0.0844, 0.0297, 0.0051, 0.0009, 0.0), strict=True))
    points = [
        {"rank": rank, "loss": 2.0308 + mean, "delta": _delta(mean, 0.05 * mean + 0.001 * (mean > 0), upper=True)}
        | {"within": mean < 0.008}
        for rank, mean in means.items()
    ]
    return {"rank": 64, "chosen": chosen, "tolerance": 0.0084, "points": points}


def _nested() -> dict[str, Any]:
    means = dict(zip(RANKS, (0.0412, 0.0121, 0.0064, 0.0043, 0.0031, 0.0028), strict=True))
    alone = {2: 0.0331, 4: 0.0142, 8: 0.0018, 16: 0.0007, 32: 0.0, 64: 0.0011}
    points = [
        {"rank": rank, "loss": 2.0297 + mean, "delta": _delta(mean - alone[rank], 0.0061, upper=True)}
        for rank, mean in means.items()
    ]
    return {"rank": 64, "points": points}


def _allocation(verdict: str = "not recommended", uniform: float = -0.0021, shuffled: float = 0.0006) -> dict[str, Any]:
    """Given out by gradients: more to the middle blocks."""
    ranks = {
        f"model.layers.{layer}.{name}": max(1, round(8 + 7 * math.sin(math.pi * (layer - 8) / 15) * (1 - number / 9)))
        for layer in range(30)
        for number, name in enumerate(NAMES)
    }
    arms = {"uniform": None, "allocated": uniform}
    arms |= {f"shuffled {n}": uniform - shuffled + off for n, off in enumerate((0.0018, -0.0011, 0.0007, -0.0014), 1)}
    points = [
        {"name": name, "parameters": 8 * EACH - 96 * (mean is not None), "status": "finished"}
        | {"loss": 2.0315 + (mean or 0.0), "delta": None if mean is None else _delta(mean, 0.0047)}
        for name, mean in arms.items()
    ]
    said = f"{uniform:+.4f} nats against rank 8 everywhere, {shuffled:+.4f} nats against the same ranks shuffled"
    return {
        "by": "gradients",
        "rank": 8,
        "ranks": ranks,
        "agreement": 0.93,
        "least": 0.8,
        "parameters": {"uniform": 8 * EACH, "allocated": 8 * EACH - 96},
        "seeds": 3,
        "verdict": verdict,
        "points": points,
        "against": {"uniform": _delta(uniform, 0.0041), "shuffled": _delta(shuffled, 0.0072)},
        "sentence": f"ranks given out by gradients are {verdict}: {said}",
    }


def _methods() -> dict[str, Any]:
    rows = (("form=dora", -0.0031, 0.0072, "cannot tell"), ("lr_ratio=16", -0.0148, 0.0066, "better"))
    points = [
        {"name": name, "status": "finished", "loss": 2.163 + mean, "delta": _delta(mean, half), "verdict": verdict}
        for name, mean, half, verdict in rows
    ]
    failed = {"name": "init=pissa", "status": "diverged", "loss": None, "delta": None, "verdict": "failed"}
    return {"points": [*points, failed]}


def _confirm(
    chosen: int = 8, best: int = 32, seeds: int = 3, verdict: str = "not worse", half: float = 0.0058
) -> dict[str, Any]:
    gains = {chosen: _delta(0.4187, 0.0402), best: _delta(0.4203, 0.0405)}
    points = [
        {"rank": chosen, "loss": 2.0423, "delta": _delta(0.0016, half, upper=True), "gain": gains[chosen]}
        | {"verdict": verdict},
        {"rank": best, "loss": 2.0407, "delta": None, "verdict": "best", "gain": gains[best]},
    ]
    return {"seeds": seeds, "tolerance": 0.0084, "chosen": chosen, "verdict": verdict, "points": points}


def _ship(**changes: Any) -> dict[str, Any]:
    ranks, spectrum = {}, {}
    for layer in range(30):
        for number, name in enumerate(NAMES):
            kept = 8 * (0.25 + 0.75 * math.sin(math.pi * (layer + 2 * number) / 36) ** 2) - (
                3 if number in (1, 2) else 0
            )
            path = f"model.layers.{layer}.{name}"
            ranks[path] = max(0, min(8, round(kept)))
            spectrum[path] = [round(2.0 * 0.6**part, 4) for part in range(8)]
    parameters = {"whole": 8 * EACH, "compressed": 1_316_992}
    losses = {"base": 2.461, "whole": 2.0423, "compressed": 2.0461}
    delta = _delta(0.0012, 0.0033, upper=True)
    control = {"status": "finished", "loss": 2.0473, "delta": delta, "kept": "compressed"}
    told = {"parameters": parameters, "losses": losses, "tolerance": 0.0081, "ranks": ranks, "spectrum": spectrum}
    return told | {"control": control, "no_control": ""} | changes


def _trial(name: str, step: str, seed: int, share: float, loss: float | None) -> dict[str, Any]:
    dice, last = random.Random(f"{name}{step}{seed}{share}"), round(share * FULL)
    steps = range(1, (last if loss is not None else last // 3) + 1)
    level = loss if loss is not None else 2.4
    curve = [[s, level - 0.1 + 0.5 * math.exp(-s / (0.3 * last)) + dice.gauss(0, 0.08)] for s in steps]
    if loss is None:
        curve = [[s, value + 0.002 * s * s] for s, value in curve]
    status = "finished" if loss is not None else "diverged"
    return {"name": name, "step": step, "seed": seed, "share": share, "status": status, "loss": loss, "curve": curve}


def _trials() -> list[dict[str, Any]]:
    noise = [_trial("r 16, 0.0005, all-linear", "noise", n, 0.25, x) for n, x in enumerate((2.163, 2.1594, 2.1662))]
    rates = [
        _trial(f"r 16, {point['lr']:.3g}, all-linear", "rate", 0, rung["share"], point["loss"])
        for rung in _rate()["rungs"]
        for point in rung["points"]
        if (rung["share"], point["lr"]) != (0.25, 5e-4)  # which the noise step had trained
    ]
    targets = [
        _trial(f"r {point['rank']}, 0.0005, {point['targets']}", "targets", 0, 0.25, point["loss"])
        for point in _targets()["points"][:2]
    ]
    ladder = [
        _trial(f"r {point['rank']}, 0.0005, all-linear", "ladder", 0, 1.0, point["loss"])
        for point in _ladder()["points"]
    ]
    methods = [_trial(f"{one['name']}, 0.0005", "methods", 0, 0.25, one["loss"]) for one in _methods()["points"]]
    confirm = [
        _trial(f"r {rank}, 0.0005, all-linear", "confirm", seed, 1.0, 2.03 + 0.001 * seed)
        for rank in (8, 32)
        for seed in (1, 2)
    ]
    ladder.append(_trial("r 64, 0.0005, all-linear, nested", "ladder", 0, 1.0, _nested()["points"][-1]["loss"]))
    allocation = [
        _trial(f"r 8 {point['name']}, 0.0005, all-linear", "allocation", seed, 1.0, point["loss"] + 0.001 * seed)
        for point in _allocation()["points"][1:]
        for seed in range(3)
    ]
    ship = [_trial("trained at the ranks left of r 8, 0.0005, all-linear", "ship", 0, 1.0, 2.0297)]
    return [*noise, *rates, *targets, *ladder, *methods, *allocation, *confirm, *ship]


def _recommendation(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "recommended",
        "sentence": "Rank 8, alpha 32, learning rate 0.0005, all-linear: enough, +0.0016 nats against rank 32 (95 % "
        "−0.0042 to +0.0074, at most +0.0065; 0.0084 are allowed), chosen in 87% of resamples; 0.419 nats better than "
        "the base (95 % 0.379 to 0.459)",
        "surer": "More seeds (--budget full) and more documents narrow every interval.",
        "rank": 8,
        "alpha": 32.0,
        "lr": 5e-4,
        "targets": "all-linear",
        "invariants": {"scale x sigma_A x lr_B": 4.81e-5, "sigma_A / lr_A": 48.11},
        "command": "rankwise train --model SmolLM2 --data train.jsonl --rank 8 --alpha 32 --lr 5e-4 --out winner",
    } | changes
