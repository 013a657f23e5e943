"""The sentence is about what is recommended, whatever was chosen before it was confirmed."""

import pytest

from rankwise.search.verdict import recommendation

CHOSEN, BEST = 4, 32
GAINS = {CHOSEN: 0.25, BEST: 0.5}


def record(verdict):
    points = [
        {
            "rank": rank,
            "loss": 2.0 - gain,
            "delta": {"mean": 0.25, "low": 0.2, "high": 0.3, "upper": 0.29} if rank == CHOSEN else None,
            "verdict": verdict if rank == CHOSEN else "best",
            "gain": {"mean": gain, "low": gain - 0.01, "high": gain + 0.01},
        }
        for rank, gain in GAINS.items()
    ]
    points_of_ladder = [{"rank": rank, "verdict": "not worse", "chosen_in": 0.5} for rank in GAINS]
    ladder = {"best": BEST, "points": points_of_ladder}
    confirm = {"chosen": CHOSEN, "verdict": verdict, "tolerance": 0.01, "points": points}
    return {"confirm": confirm, "ladder": ladder, "noise": None, "rate": None}


@pytest.mark.parametrize(
    ("verdict", "kept", "kind"),
    [("not worse", CHOSEN, "recommended"), ("worse", BEST, "provisional"), ("cannot tell", BEST, "cannot tell")],
)
def test_the_gain_that_is_told_is_that_of_the_rank_that_is_kept(verdict, kept, kind):
    settings = {"rank": kept, "alpha": 8.0, "lr": 1e-3, "targets": "mlp"}
    found = recommendation(record(verdict), settings)
    assert found["kind"] == kind
    assert found["sentence"].startswith(f"Rank {kept}, ")
    assert f"{GAINS[kept]:.3f} nats better than the base" in found["sentence"]


@pytest.mark.parametrize(
    ("verdict", "said"),
    [("worse", "is worse"), ("cannot tell", "is not shown to be enough"), ("not worse", "would be enough here too")],
)
def test_of_the_next_smaller_rank_it_is_said_what_new_documents_say(verdict, said):
    told = record("not worse")
    below = [told["confirm"]["points"][0] | {"rank": rank, "verdict": verdict} for rank in (1, 2)]
    told["confirm"]["points"] = [*below, *told["confirm"]["points"]]
    found = recommendation(told, {"rank": CHOSEN, "alpha": 8.0, "lr": 1e-3, "targets": "mlp"})
    assert f"; rank 2 {said}; " in found["sentence"]


def test_of_a_best_that_was_chosen_itself_it_is_said_what_of_smaller_ones_is_known():
    told = record("not worse")
    told["confirm"] |= {"chosen": BEST, "verdict": "alone", "points": told["confirm"]["points"][1:]}
    for verdict, said in (("worse", "measurably better than every smaller rank;"), ("cannot tell", "cannot be told")):
        verdicts = {8: "worse", 16: verdict, BEST: "best", 64: "not worse"}
        told["ladder"]["points"] = [{"rank": r, "verdict": v, "chosen_in": 0.5} for r, v in verdicts.items()]
        found = recommendation(told, {"rank": BEST, "alpha": 8.0, "lr": 1e-3, "targets": "mlp"})
        assert said in found["sentence"]
        assert ("rank 16 is enough" in found["sentence"]) == (verdict == "cannot tell")
