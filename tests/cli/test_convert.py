"""`rankwise convert` as a person meets it."""

import re

import gguf
import torch


def test_it_says_where_how_far_off_and_what_to_type_next(rankwise, world, adapter, tmp_path):
    done = rankwise("convert", adapter, "--to", "gguf", "--model", world / "llama", "--out", tmp_path / "a.gguf")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'a.gguf'}: 14 layers, rank 4, ")
    assert re.fullmatch(
        r"peft → gguf; ΔW is (the same|off by \de-0[89] of its norm|off by \d\.\de-0[89] of its norm)", lines[1]
    )
    assert lines[2:] == [
        "use it:",
        *(f"  llama-{name} -m MODEL.gguf --lora {tmp_path / 'a.gguf'}" for name in ("cli", "server")),
    ]
    assert len(gguf.GGUFReader(tmp_path / "a.gguf").tensors) == 28


def test_for_vllm_it_names_the_options(rankwise, adapter, tmp_path):
    done = rankwise("convert", adapter, "--for", "vllm", "--out", tmp_path / "out")
    assert done.code == 0
    assert f" --enable-lora --max-lora-rank 8 --lora-modules out={tmp_path / 'out'}\n" in done.out


def test_json_is_all_there_is_and_mistakes_have_a_way_out(rankwise, adapter, tmp_path):
    found = rankwise("convert", adapter, "--to", "mlx", "--out", tmp_path / "mlx", "--json").json
    assert (found["to"], found["layers"]) == ("mlx", 14)
    torch.save({"layer.lora_A": torch.ones(2, 4), "layer.lora_B": torch.ones(8, 1)}, tmp_path / "a.pt")
    done = rankwise("convert", tmp_path / "a.pt", "--to", "peft", "--out", tmp_path / "p")
    assert done.code == 1
    assert "→ --alpha, as it was in training" in done.err
    asked = ("convert", tmp_path / "a.pt", "--to", "peft", "--out", tmp_path / "p", "--alpha", 4)
    assert "hint" in rankwise(*asked, "--enable-lora", "yes", "--json").json
    done = rankwise(*asked)
    assert "note: 1 merged layer: taken as enable_lora=[True, False, True]" in done.out
    assert rankwise(*asked[:-2], "--enable-lora", "true,false", "--alpha", 4).code == 1


def test_dora_for_vllm_shows_what_each_rank_would_lose(rankwise, world, tmp_path):
    from tests.jobs.world import write_adapter

    source = write_adapter(tmp_path / "dora", world / "llama", form="dora", targets=("q_proj",))
    done = rankwise("convert", source, "--for", "vllm", "--model", world / "llama", "--out", tmp_path / "out")
    assert done.code == 0
    assert "DoRA became plain LoRA; by --rank ΔW is off by 1: " in done.out
