import json
import struct
import time

import pytest
import torch

from rankwise.errors import AdapterFileError
from rankwise.formats.tensors import read_tensors, write_tensors, write_text


def write(path, cut: int | None = None) -> bytes:
    write_tensors(path, {"a": torch.arange(100.0), "b": torch.ones(3, 4, dtype=torch.bfloat16)})
    data = path.read_bytes()
    if cut is not None:
        path.write_bytes(data[:cut])
    return data


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path)
    back = read_tensors(path)
    assert torch.equal(back["a"], torch.arange(100.0))
    assert back["b"].dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("cut", [0, 4, 20, 200, -1])
def test_a_file_cut_short_is_refused_and_named(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    write(path, cut)
    with pytest.raises(AdapterFileError, match=r"x\.safetensors: not a whole safetensors file"):
        read_tensors(path)


def hostile(**entry: object) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 8


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        hostile(shape=[2**32, 2**32]),
        hostile(shape=[-2]),
        hostile(data_offsets=[0, 2**40]),
        hostile(data_offsets=[8, 0]),
        hostile(dtype="F99"),
        b"\x80\x04\x95" + b"pickled" * 20,
        b"",
    ],
    ids=[
        "huge header",
        "overflow header",
        "huge shape",
        "negative",
        "out of range",
        "backwards",
        "type",
        "pickle",
        "empty",
    ],
)
def test_hostile_headers_are_refused_at_once(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    begun = time.monotonic()
    with pytest.raises(AdapterFileError):
        read_tensors(path)
    assert time.monotonic() - begun < 1


def test_a_pickle_is_named_and_never_opened(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"anything")
    with pytest.raises(AdapterFileError, match="never opened"):
        read_tensors(tmp_path / "adapter_model.safetensors")


def test_the_old_file_stays_when_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "x.safetensors"
    before = write(path)
    with pytest.raises(AdapterFileError, match="not finite"):
        write_tensors(path, {"a": torch.tensor([torch.nan])})
    assert path.read_bytes() == before


def test_text_is_replaced_whole(tmp_path):
    write_text(tmp_path / "t.json", "旧")
    write_text(tmp_path / "t.json", "新")
    assert (tmp_path / "t.json").read_text(encoding="utf-8") == "新"
    assert len(list(tmp_path.iterdir())) == 1
