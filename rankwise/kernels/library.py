"""The compiled half of this room: found, checked against the processor, and opened, or absent.

The C files are built when rankwise is installed, by the C compiler that is there, and are optional: without them, on
another processor, or for tensors that are not bfloat16, every operation takes its plain PyTorch path.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

Pointer, Int, Float = c_void_p, c_int64, c_float


class Heads(ctypes.Structure):
    """A tensor `[tokens, heads, width]` as the C side sees it: address and two strides, in elements."""

    _fields_ = [("data", c_void_p), ("token", c_int64), ("head", c_int64)]

    @classmethod
    def of(cls, x: torch.Tensor) -> Heads:
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class TensorRows(ctypes.Structure):
    """A matrix whose rows may lie apart: address, and elements between rows."""

    _fields_ = [("data", c_void_p), ("step", c_int64)]

    @classmethod
    def of(cls, x: torch.Tensor) -> TensorRows:
        return cls(x.data_ptr(), x.stride(0))


class Matrix(ctypes.Structure):
    """lowrank.c, Weight."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("rows", "columns", "across", "code")),
        *((name, c_void_p) for name in ("scales", "groups", "offset", "scale_values", "values")),
    ]


class LowRankPart(ctypes.Structure):
    """lowrank.c, Part."""

    _fields_ = [
        *((name, c_int64) for name in ("start", "stop", "rank")),
        *((name, c_void_p) for name in ("A", "B", "gain", "keep", "shrink", "grad_A", "grad_B", "grad_gain")),
        ("scale", c_float),
        ("rest", c_float),
    ]


class Layout(ctypes.Structure):
    """attention.c, Layout."""

    _fields_ = [
        ("bounds", POINTER(c_int64)),
        ("after", POINTER(c_int64)),
        *((name, c_int64) for name in ("count", "tokens", "heads", "groups", "width")),
        ("scale", c_float),
        ("window", c_int64),
        ("causal", c_int64),
    ]


class Factors(ctypes.Structure):
    """serving.c, Factors."""

    _fields_ = [*((name, c_void_p) for name in ("A", "B", "gain")), ("rank", c_int64)]


class Plain(ctypes.Structure):
    """serving.c, Plain."""

    _fields_ = [
        *((name, c_void_p) for name in ("A", "B", "to_A", "to_B")),
        *((name, c_int64) for name in ("rank", "inputs", "outputs")),
        ("scale", c_float),
    ]


class SiteOf(ctypes.Structure):
    """serving.c, Site."""

    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("factors", POINTER(Factors)),
        ("count", c_int64),
    ]


class Past(ctypes.Structure):
    """serving.c, Past."""

    _fields_ = [
        *((name, c_void_p) for name in ("seen", "begins", "tables")),
        *((name, c_int64) for name in ("block", "heads", "groups", "width", "window")),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class LayerOf(ctypes.Structure):
    """serving.c, Layer."""

    _fields_ = [
        *((name, c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        *((name, SiteOf) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("keys", "values")),
        ("window", c_int64),
    ]


class DecoderOf(ctypes.Structure):
    """serving.c, Decoder."""

    _fields_ = [
        ("layers", POINTER(LayerOf)),
        *((name, c_int64) for name in ("count", "hidden", "activation")),
        ("eps", c_float),
        ("offset", c_float),
    ]


WORDS = ("pairs", "wide")  # words.h: what the products of training are computed in

_PRODUCTS = {
    "attention_forward": (c_int, [Heads, Heads, Heads, Pointer, Pointer, Layout]),
    "attention_backward": (c_int, [Heads, Heads, Heads, Pointer, Pointer, Heads, *[Pointer] * 3, Layout]),
    "lowrank_forward": (c_int, [TensorRows, Matrix, Pointer, POINTER(LowRankPart), Int, Pointer, Int, Int, Int]),
    "lowrank_backward": (
        c_int,
        [TensorRows, TensorRows, Pointer, Matrix, Pointer, POINTER(LowRankPart), Int, Pointer, Int, Int, Int],
    ),
}  # each there once for either kind of words

_FUNCTIONS = {
    "norm_forward": (None, [*[Pointer] * 4, Int, Int, Float, Float]),
    "norm_backward": (None, [*[Pointer] * 5, Int, Int, Float]),
    "gain_forward": (None, [*[Pointer] * 3, Int, Int]),
    "gain_backward": (c_int, [*[Pointer] * 5, Int, Int]),
    "gate_forward": (None, [*[Pointer] * 3, Int, Int]),
    "gate_backward": (None, [*[Pointer] * 5, Int, Int]),
    "rotary": (None, [*[Pointer] * 4, POINTER(c_int64), POINTER(c_int64), *[Int] * 6]),
    "cross_entropy": (None, [*[Pointer] * 4, Int, Int, Int]),
    "grouped_product": (c_int, [POINTER(SiteOf), *[Pointer] * 3, Int, c_int]),
    "lay_out": (None, [POINTER(Plain), Int, c_int]),
    "cached_attention": (c_int, [POINTER(Past), Heads, Heads, Heads, *[Pointer] * 3, Int, Int, Int, c_int]),
    "decoder_step": (c_int, [POINTER(DecoderOf), POINTER(Past), Pointer, Int, *[Pointer] * 3, c_int]),
    "rankwise_supported": (c_int, []),
    "rankwise_widens": (c_int, []),
    **{f"{name}_{words}": types for name, types in _PRODUCTS.items() for words in WORDS},
}


def _share_threads() -> bool:
    """Makes torch's OpenMP runtime visible to the library, which is linked to none of its own.

    A second runtime would bring a second set of threads, and two sets that spin for work on the same cores cost
    milliseconds a call.  Linux only: the runtime is looked up among the files this process has mapped.
    """
    try:
        for path in _mapped(Path("/proc/self/maps").read_text()):
            if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
                return True
    except OSError:  # no such list, or a file that is no longer where it was mapped from
        return False
    return False


def _mapped(maps: str) -> list[str]:
    """The files in a list of mappings (proc_pid_maps(5)): five columns, then a path, which may have spaces in it."""
    columns = (line.split(maxsplit=5) for line in maps.splitlines())
    paths = {column[5].removesuffix(" (deleted)") for column in columns if len(column) == 6}
    return sorted(path for path in paths if path.startswith("/"))


@cache
def native() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or this processor lacks AVX-512 with BF16."""
    spec = importlib.util.find_spec("rankwise.kernels._native")
    if spec is None or spec.origin is None or not _share_threads():
        return None
    library = ctypes.CDLL(spec.origin)
    if not library.rankwise_supported():
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def product(name: str) -> Any:
    """A product of training, such as "lowrank_forward", in the words that are faster on this processor.

    The processor's maker decides and no measurement, so that a resumed run goes on to the last bit.  The variable
    RANKWISE_WORDS, "pairs" or "wide", decides otherwise.

    Raises:
        ValueError: RANKWISE_WORDS is something else.
    """
    library = native()
    words = os.environ.get("RANKWISE_WORDS") or WORDS[library.rankwise_widens()]  # type: ignore[union-attr]
    if words not in WORDS:
        raise ValueError(f"RANKWISE_WORDS is {words!r}; it can be {' or '.join(WORDS)}")
    return getattr(library, f"{name}_{words}")


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the compiled kernels take these tensors: bfloat16 in main memory."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors) and native() is not None
