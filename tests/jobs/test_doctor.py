import json

from rankwise.jobs.doctor import run_checks


def test_this_installation_is_well():
    found = run_checks()
    json.dumps(found, allow_nan=False)
    assert found.keys() == {"versions", "machine", "optional", "products_gflops", "smoke_run"}
    smoke = found["smoke_run"]
    assert smoke["learns"] is True
    assert smoke["saves_and_loads"] is True
    assert smoke["merge_error"] < 0.02
    assert (
        smoke["last_loss"] < 0.3 * smoke["first_loss"]
    )  # not by a hair: a check that may fail by chance tells nothing
    assert all(speed > 0 for speed in found["products_gflops"].values())
    assert found["machine"]["memory_bytes"] > 2**28
    assert all(found["versions"].values())
