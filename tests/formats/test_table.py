"""What lies at a path is found out by looking, and what is not known is told as it was seen."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rankwise.errors import AdapterFileError
from rankwise.formats.table import FORMATS, WRITTEN, found_format

ONE = torch.ones(1)
KEYS = {
    "lora_unet_mid_block_x.lora_down.weight": "kohya",
    "lycoris_mid_block_x.lora_up.weight": "kohya",
    "unet.a.lora_A.weight": "diffusers",
    "a.processor.to_q_lora.down.weight": "diffusers",
    "text_encoder.a.lora_linear_layer.up.weight": "diffusers",
    "unet.a.to_k.lora.up.weight": "diffusers",
    "a.query.lora_A": "loralib",
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("in_folder", [True, False])
def test_a_file_of_tensors_is_known_by_how_its_keys_are_spelt(tmp_path, key, in_folder):
    save_file({key: ONE}, tmp_path / "some.safetensors")
    found, path = found_format(tmp_path if in_folder else tmp_path / "some.safetensors")
    assert (found.name, path) == (KEYS[key], tmp_path / "some.safetensors")


def test_folders_are_known_by_their_files(tmp_path):
    for name, files in {"peft": ["adapter_model.safetensors"], "mlx": ["adapters.safetensors"]}.items():
        (tmp_path / name).mkdir()
        for file in ["adapter_config.json", *files]:
            (tmp_path / name / file).touch()
        assert found_format(tmp_path / name)[0].name == name


def test_gguf_is_known_by_its_first_bytes_and_pickles_by_what_is_in_them(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "nameless", "llama")
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert found_format(tmp_path / "nameless")[0].name == "gguf"
    torch.save({"a.lora_A": ONE, "a.lora_B": ONE}, tmp_path / "a.pt")
    assert found_format(tmp_path / "a.pt")[0].name == "loralib"


def test_what_is_not_known_is_told_as_it_was_seen(tmp_path):
    def told(path):
        with pytest.raises(AdapterFileError) as refused:
            found_format(path)
        return str(refused.value)

    assert "no such file or folder" in told(tmp_path / "nowhere")
    assert "it holds:\n  nothing" in told(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "it holds:\n  notes.txt" in told(tmp_path)
    assert "a file of 5 bytes, neither GGUF" in told(tmp_path / "notes.txt")
    save_file({f"model.{n}.weight": ONE.clone() for n in range(9)}, tmp_path / "model.safetensors")
    assert "its tensors are called:\n  model.0.weight" in told(tmp_path / "model.safetensors")
    assert "… and 4 more" in told(tmp_path / "model.safetensors")
    torch.save({"weight": ONE}, tmp_path / "model.pt")
    assert "its tensors are called:\n  weight" in told(tmp_path / "model.pt")
    assert "of several files name one" in told(tmp_path)
    save_file({"base_model.model.a.lora_A.weight": ONE}, tmp_path / "adapter_model.safetensors")
    assert f"without its config\n  → name {tmp_path}" in told(tmp_path / "adapter_model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x09")
    assert "not a whole safetensors file" in told(tmp_path / "cut.safetensors")


def test_one_format_is_read_only():
    assert set(FORMATS) - set(WRITTEN) == {"loralib"}
