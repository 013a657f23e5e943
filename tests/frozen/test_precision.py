"""Which number format, and the reason that is printed beside it."""

import pytest
import torch

from rankwise.errors import SpecError
from rankwise.frozen.precision import choose_precision, cpu_has_bfloat16


def test_a_processor_gets_bfloat16_exactly_where_it_multiplies_it():
    found = choose_precision(torch.device("cpu"))
    if cpu_has_bfloat16():
        assert (found.dtype, found.reason) == (torch.bfloat16, "the CPU multiplies it natively")
    else:
        assert (found.dtype, found.reason) == (torch.float32, "no fast bfloat16 on this CPU")


def test_what_the_processor_says_is_what_the_system_says():
    """Linux lists the two features by name; torch asks the processor itself."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((set(line.split()) for line in file if line.startswith("flags")), None)
    except OSError:
        flags = None
    if flags is None:  # no Linux, or no x86: then torch's answer is all there is, and it is a plain yes or no
        assert cpu_has_bfloat16() in (True, False)
    else:
        assert cpu_has_bfloat16() == bool(flags & {"avx512_bf16", "amx_tile"})


@pytest.mark.parametrize("kind", ["mps", "xpu", "meta"])
def test_other_devices_stay_with_float32_and_are_named(kind):
    found = choose_precision(torch.device(kind))
    assert found.dtype == torch.float32
    assert kind.upper() in found.reason


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_what_is_asked_for_is_what_is_given_on_any_device(name, kind):
    found = choose_precision(torch.device(kind), name)
    assert found.dtype == getattr(torch, name)
    assert found.reason == "asked for"


@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "nf4", "float64", "Auto", "", "torch.bfloat16"])
def test_other_names_are_refused_with_the_list_of_those_there_are(name):
    with pytest.raises(SpecError) as caught:
        choose_precision(torch.device("cpu"), name)
    assert repr(name) in caught.value.message
    assert caught.value.hint == "auto, bfloat16, float16, float32"
