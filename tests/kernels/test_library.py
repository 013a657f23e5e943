"""The compiled kernels are one way of two: found where they can run, taken only for what they can read."""

import ctypes
from importlib.util import find_spec

import pytest
import torch

from rankwise.kernels import library
from rankwise.kernels.library import WORDS, Heads, native, product, serves


def test_they_are_used_on_every_processor_that_can_run_them_and_that_has_them_built():
    """Absent, everything takes its plain path: tests/test_house.py runs the engine without them."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        flags = set()
    wanted = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}
    if native() is not None:
        assert wanted <= flags
        assert native().rankwise_supported() == 1
    else:
        assert not wanted <= flags or find_spec("rankwise.kernels._native") is None


def test_the_library_is_opened_once():
    assert native() is native()


def test_only_bfloat16_in_main_memory_is_served():
    here = native() is not None
    low = torch.ones(2, dtype=torch.bfloat16)
    assert serves(low) == serves(low, low) == here
    for other in (torch.float32, torch.float16, torch.float64, torch.int64):
        assert not serves(torch.ones(2, dtype=other))
        assert not serves(low, torch.ones(2).to(other))
    assert not serves(torch.ones(2, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("shape", [(5, 3, 16), (1, 1, 16)])
def test_heads_tell_the_place_of_every_number(shape):
    """Address and strides, read back byte by byte as the C side does it."""
    x = torch.randn(shape).bfloat16().transpose(0, 1).contiguous().transpose(0, 1)
    heads = Heads.of(x)
    for token in range(shape[0]):
        for head in range(shape[1]):
            place = heads.data + 2 * (token * heads.token + head * heads.head)
            raw = bytearray(ctypes.string_at(place, 2 * shape[2]))
            assert torch.equal(torch.frombuffer(raw, dtype=torch.bfloat16), x[token, head])


def test_every_function_is_there_with_its_types():
    """A name that is missing in the compiled file is found when it is opened, not when it is first called."""
    if native() is not None:
        for name, (result, arguments) in library._FUNCTIONS.items():
            function = getattr(native(), name)
            assert function.restype is result
            assert function.argtypes == arguments
    assert {"attention_forward_wide", "norm_backward", "cross_entropy"} <= library._FUNCTIONS.keys()


needs_native = pytest.mark.skipif(native() is None, reason="no compiled kernels here")


@needs_native
def test_the_maker_of_the_processor_decides_on_words(monkeypatch):
    monkeypatch.delenv("RANKWISE_WORDS", raising=False)
    with open("/proc/cpuinfo") as file:
        words = "wide" if "GenuineIntel" in file.read() else "pairs"
    assert product("lowrank_forward") is getattr(native(), f"lowrank_forward_{words}")


@needs_native
@pytest.mark.parametrize("words", WORDS)
def test_the_environment_may_decide_otherwise(monkeypatch, words):
    monkeypatch.setenv("RANKWISE_WORDS", words)
    assert product("attention_backward") is getattr(native(), f"attention_backward_{words}")


@needs_native
def test_words_that_are_unknown_are_an_error(monkeypatch):
    monkeypatch.setenv("RANKWISE_WORDS", "long")
    with pytest.raises(ValueError, match="RANKWISE_WORDS is 'long'; it can be pairs or wide"):
        product("lowrank_forward")


def test_mapped_files_are_found_whatever_their_path_looks_like():
    maps = (
        "7f0-7f1 r-xp 00000000 08:01 42   /opt/my tools/lib/libgomp.so.1\n"
        "7f1-7f2 r-xp 00000000 08:01 43   /opt/old/libc.so.6 (deleted)\n"
        "7f2-7f3 rw-p 00000000 00:00 0\n"
        "7f3-7f4 rw-p 00000000 00:00 0    [heap]\n"
    )
    assert library._mapped(maps) == ["/opt/my tools/lib/libgomp.so.1", "/opt/old/libc.so.6"]


def test_a_runtime_that_cannot_be_opened_leaves_the_plain_path(monkeypatch):
    monkeypatch.setattr(library, "_mapped", lambda maps: ["/nowhere/libgomp.so.1"])
    assert not library._share_threads()
