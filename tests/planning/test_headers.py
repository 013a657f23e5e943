"""Headers of safetensors files: read as the library writes them, and refused at once where they lie."""

import json
import struct
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from rankwise.errors import ModelError
from rankwise.planning.headers import Stored, read_header, read_headers


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_headers(tmp_path)
    assert found == {"a": Stored((2, 3), "F32", 24), "b": Stored((5,), "BF16", 10), "c": Stored((0, 4), "F32", 0)}


LIES = {
    "not a header": (b"no json", b"", None, "cannot be read"),
    "longer than the file": ({}, b"", 2**40, "1,099,511,627,776 bytes"),
    "too long a header": ({}, b"", 100_000_001, "100,000,001 bytes"),
    "a list": ([], b"", None, "no table of tensors"),
    "nothing said": ({"a": {}}, b"", None, "no dtype, shape and pair"),
    "no such type": ({"a": entry([1], 0, 4, "F5")}, b"1234", None, "type 'F5'"),
    "negative": ({"a": entry([-1], 0, 4)}, b"1234", None, r"shape \[-1\]"),
    "a fraction": ({"a": entry([1.5], 0, 4)}, b"1234", None, r"shape \[1.5\]"),
    "another size": ({"a": entry([2], 0, 4)}, b"1234", None, "takes 8 bytes, not 4"),
    "a product beyond all": ({"a": entry([2**62, 2**62], 0, 4)}, b"1234", None, "not 4"),
    "out of the file": ({"a": entry([2], 0, 8)}, b"1234", None, "take 8 bytes, the file has room for 4"),
    "over each other": ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456", None, "begins at byte 2"),
    "a hole": ({"a": entry([1], 4, 8)}, b"12345678", None, "begins at byte 4"),
    "twice": (b'{"a": {}, "a": {}}', b"", None, "stands in it twice"),
    "deep": (b"[" * 100_000, b"", None, "cannot be read"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused_at_once(tmp_path, name):
    header, data, length, said = LIES[name]
    path = write(tmp_path / "model.safetensors", header, data, length)
    begun = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(ModelError, match=said):
        read_header(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - begun < 1
    assert most < 64 * 2**20


def test_an_empty_file_and_one_cut_short(tmp_path):
    for content in (b"", b"123"):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            read_header(tmp_path / "x.safetensors")


def test_an_index_names_its_files(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(ModelError, match=r"not there:\n  two.safetensors"):
        read_headers(tmp_path)
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    save_file({"c": torch.zeros(3)}, tmp_path / "elsewhere.safetensors")
    assert read_headers(tmp_path).keys() == {"a", "b"}
    save_file({"a": torch.zeros(3)}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match="another file of the folder holds too"):
        read_headers(tmp_path)
    index.write_text("[]")
    with pytest.raises(ModelError, match="not an index"):
        read_headers(tmp_path)
