"""What a search comes to: one sentence with its numbers, how far it may be believed, and what would make it surer."""

from __future__ import annotations

import math
from typing import Any

_ONE_SIDED = 1.645  # Student's is near it for the many documents that are asked for


def recommendation(record: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """From the answers of an `Advisor` whose `confirm` has been asked.

    Args:
        record: the answers.
        settings: `rank`, `rank_pattern`, `alpha`, `lr`, `targets` that were found.

    Returns:
        `kind` (`recommended`, `provisional` or `cannot tell`), `sentence`, `surer`, and the settings.
    """
    kind, reason = _judged(record)
    rank = f"rank {settings['rank']}" + (" given out by layer" if settings.get("rank_pattern") else "")
    found = f"{rank}, alpha {settings['alpha']:g}, learning rate {settings['lr']:.3g}"
    sentence = f"{found}, {settings['targets']}: {reason}"
    if (allocation := record.get("allocation")) is not None:
        sentence += f"; {allocation['sentence']}"
    return {"kind": kind, "sentence": sentence[0].upper() + sentence[1:], "surer": _surer(record), **settings}


def _judged(record: dict[str, Any]) -> tuple[str, str]:
    confirm, ladder = record["confirm"], record["ladder"]
    points = {point["rank"]: point for point in confirm["points"]}
    best = max(points) if ladder is None else ladder["best"]
    kept = confirm["chosen"] if confirm["verdict"] in ("not worse", "alone") else best
    gain = points[kept]["gain"]
    if gain["low"] <= 0:
        return "cannot tell", (
            f"training is not shown to gain anything, {gain['mean']:+.4f} nats over the base (95 % {gain['low']:+.4f} "
            f"to {gain['high']:+.4f}) on documents that no choice looked at"
        )
    told = f"; {gain['mean']:.3f} nats better than the base (95 % {gain['low']:.3f} to {gain['high']:.3f})"
    if confirm["verdict"] == "alone":
        return _alone(record, best, f"{_below(points, best)}{told}")
    delta = points[confirm["chosen"]]["delta"]
    apart = (
        f"{delta['mean']:+.4f} nats against rank {best} (95 % {delta['low']:+.4f} to {delta['high']:+.4f}, at most "
        f"{delta['upper']:+.4f}; {confirm['tolerance']:.4f} are allowed)"
    )
    if confirm["verdict"] == "not worse":
        often = "" if ladder is None else f", chosen in {100 * _often(ladder, confirm['chosen']):.0f} % of resamples"
        kind = "provisional" if ladder is None else "recommended"
        return kind, f"enough, {apart}{often}{_below(points, confirm['chosen'])}{told}"
    if confirm["verdict"] == "worse":
        return (
            "provisional",
            f"rank {confirm['chosen']} was chosen and not confirmed, {apart}, so the best is kept{told}",
        )
    return (
        "cannot tell",
        f"whether rank {confirm['chosen']} is enough cannot be told, {apart}, so the best is kept{told}",
    )


def _below(points: dict[int, dict[str, Any]], chosen: int) -> str:
    """What these documents say of the next smaller rank, where it was trained with as many seeds."""
    rank = max((rank for rank in points if rank < chosen), default=None)
    if rank is None:
        return ""
    said = {"worse": "is worse", "cannot tell": "is not shown to be enough", "not worse": "would be enough here too"}
    return f"; rank {rank} {said[points[rank]['verdict']]}"


def _alone(record: dict[str, Any], best: int, told: str) -> tuple[str, str]:
    """The best of the ladder was chosen itself: because smaller ones are worse, or because nobody can tell."""
    ladder = record["ladder"]
    if ladder is None:
        return "provisional", f"the largest rank that was tried, and no smaller one is shown to be enough{told}"
    below = [point for point in ladder["points"] if point["rank"] < best]
    open_ = [f"{point['rank']}" for point in below if point["verdict"] == "cannot tell"]
    if open_:
        return "cannot tell", f"the lowest loss, and whether rank {' or '.join(open_)} is enough cannot be told{told}"
    if best == max(point["rank"] for point in ladder["points"]):
        return (
            "provisional",
            f"the largest rank that was tried, and measurably the best: larger ones may be better{told}",
        )
    if not below:
        return "recommended", f"the smallest rank{told}"
    return "recommended", f"measurably better than every smaller rank{told}"


def _often(ladder: dict[str, Any], rank: int) -> float:
    return next(point["chosen_in"] for point in ladder["points"] if point["rank"] == rank)


def _surer(record: dict[str, Any]) -> str:
    """What of documents and seeds the doubt is made of, and how much more of them it takes."""
    confirm, noise, rate = record["confirm"], record["noise"], record["rate"]
    said = []
    if rate is not None and not rate["interior"]:
        said.append("The best learning rate lies at the end of those that were tried: begin with --lr nearer to it.")
    if record["ladder"] is None:
        said.append("--budget standard trains every rank instead of cutting one adapter.")
    for point in confirm["points"]:
        delta = point["delta"]
        if point["rank"] != confirm["chosen"] or delta is None or delta["upper"] <= confirm["tolerance"]:
            continue
        error = (delta["upper"] - delta["mean"]) / _ONE_SIDED
        times = math.ceil((_ONE_SIDED * error / confirm["tolerance"]) ** 2) if confirm["tolerance"] > 0 else 0
        if times > 1:
            said.append(
                f"To tell rank {point['rank']} from the best within {confirm['tolerance']:.4f} nats takes about "
                f"{times} times as many documents to confirm on, and as many seeds."
            )
    if noise is not None and noise["detectable"] > noise["tolerance"]:
        said.append(
            f"One training moves by {noise['deviation']:.4f} nats from seed to seed: below {noise['detectable']:.4f} "
            "nats two trainings with one seed each cannot be told apart."
        )
    return " ".join(said) or "More seeds (--budget full) and more documents narrow every interval."
