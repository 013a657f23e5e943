"""What a plan is asked for, and the machine it is made for."""

import pytest
import torch

from rankwise.engine.head import chunk_rows
from rankwise.errors import SpecError
from rankwise.frozen.precision import choose_precision
from rankwise.kernels.library import native
from rankwise.planning.limits import CHUNK_BYTES, LEAST_CHUNK
from rankwise.planning.request import METHODS, PlanRequest, machine_for


def test_the_engine_keeps_the_limits_that_are_planned_with():
    cpu = torch.device("cpu")
    assert chunk_rows(10**12, torch.float32, cpu) == LEAST_CHUNK
    assert chunk_rows(1000, torch.float32, cpu) == CHUNK_BYTES["cpu"] // 4000


def test_the_machine_is_judged_as_torch_judges_it():
    found = machine_for(PlanRequest(device="cpu"))
    dtype = choose_precision(torch.device("cpu")).dtype
    assert found.dtype == str(dtype).removeprefix("torch.")
    if native() is not None:
        assert found.compiled == (dtype == torch.bfloat16)
    assert not machine_for(PlanRequest(device="cpu", dtype="float32")).compiled
    assert machine_for(PlanRequest(device="cuda")).dtype == "bfloat16"


def test_methods_are_points_of_two_axes():
    assert {name: PlanRequest(method=name).held_as for name in METHODS} == {
        "full": "dense",
        "lora": "dense",
        "dora": "dense",
        "adalora": "dense",
        "qlora": "nf4",
    }
    assert PlanRequest(method="qlora", storage="int8").held_as == "int8"
    assert PlanRequest(targets="q_proj, v_proj").targets == ("q_proj", "v_proj")
    assert PlanRequest(targets="re:.*q_proj").targets == ".*q_proj"


def test_mistakes_are_listed():
    with pytest.raises(SpecError, match=r"(?s)rank = 0.*'bach_tokens' is not a setting; did you mean 'batch_tokens'"):
        PlanRequest(rank=0, bach_tokens=3)
