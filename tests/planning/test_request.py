"""The numbers that planning must share with the engine, which it cannot import."""

import pytest
import torch

from rankwise.engine.head import _CHUNK_BYTES, chunk_rows
from rankwise.engine.loop import MICRO_TOKENS
from rankwise.errors import SpecError
from rankwise.frozen.precision import choose_precision
from rankwise.kernels.library import native
from rankwise.planning import request as planned
from rankwise.planning.request import METHODS, PlanRequest, machine_for


def test_the_engine_s_limits_are_the_same():
    assert planned.MICRO_TOKENS == MICRO_TOKENS
    assert planned.CHUNK_BYTES == _CHUNK_BYTES
    assert chunk_rows(10**12, torch.float32, torch.device("cpu")) == planned.LEAST_CHUNK


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
