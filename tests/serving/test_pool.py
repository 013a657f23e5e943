"""Whom the bank holds: few at a time, never one that is in use, and always the one that was asked for."""

import asyncio
import shutil
from contextlib import AsyncExitStack, contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.adapters.spec import LoraSpec
from rankwise.data.template import Template
from rankwise.errors import AdapterFileError, AdapterMismatchError, BankError, QueueFullError, SpecError
from rankwise.formats.peft import read_adapter
from rankwise.frozen.load import load_base
from rankwise.serving.admission import Admission, Parts, allowed_folder
from rankwise.serving.engine import Engine
from rankwise.serving.pool import Pool
from rankwise.serving.wire import RefusedError
from rankwise.surgery.bank import Bank
from tests.grid import trained
from tests.jobs.world import write_adapter


@contextmanager
def pooled(shelf, **settings):
    base = load_base(shelf / "model", dtype="float32", device="cpu")
    bank = Bank(base.model)
    engine = Engine(bank, cache_bytes=1 << 22)
    admission = Admission(bank, base, Template(base.tokenizer).digest)
    engine.start()
    try:
        yield Pool(engine, admission, **{"resident": 2, "patience": 0.2, **settings})
    finally:
        engine.stop()
        bank.close()


async def filled(pool, shelf, names="abc"):
    for name, kind in zip(names, ("a", "b", "dora", "head"), strict=False):
        await pool.add(name, shelf / "adapters" / kind)


def test_the_longest_unused_gives_way(shelf):
    async def go(pool):
        await filled(pool, shelf)
        for name, resident in (("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("b", "cb")):
            async with pool.through(name) as through:
                assert pool.engine.bank.adapter(through.key).digest() == through.digest
            assert "".join(pool.resident) == resident
        assert len(pool.engine.bank.names) == 2
        assert (pool.figures.loads, pool.figures.evictions) == (4, 2)

    with pooled(shelf) as pool:
        asyncio.run(go(pool))


def test_who_is_in_use_stays_and_who_finds_no_room_is_told_to_come_again(shelf):
    async def go(pool):
        await filled(pool, shelf)
        async with AsyncExitStack() as stack:
            used = [await stack.enter_async_context(pool.through(name)) for name in "ab"]
            with pytest.raises(QueueFullError, match="all 2 adapters"):
                async with pool.through("c"):
                    pass
            assert set(pool.engine.bank.names) == {one.key for one in used}
            pool.patience = 20
            waiting = asyncio.create_task(held(pool, "c"))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await stack.aclose()
            await waiting
        assert pool.resident == ("b", "c")

    with pooled(shelf) as pool:
        asyncio.run(go(pool))


async def held(pool, name, until=None):
    async with pool.through(name) as through:
        if until is not None:
            await until.wait()
        return through


def test_unloading_waits_for_who_runs_through_it_and_takes_nobody_new(shelf):
    async def go(pool):
        await filled(pool, shelf, "a")
        until = asyncio.Event()
        running = asyncio.create_task(held(pool, "a", until))
        while not pool.resident:
            await asyncio.sleep(0.01)
        leaving = asyncio.create_task(pool.remove("a"))
        await asyncio.sleep(0.05)
        assert not leaving.done()
        with pytest.raises(RefusedError, match="no model 'a'"):
            await held(pool, "a")
        until.set()
        key = (await running).key
        await leaving
        assert key not in pool.engine.bank

    with pooled(shelf) as pool:
        asyncio.run(go(pool))


def test_a_name_gets_other_weights_while_the_old_ones_are_still_in_use(shelf):
    async def go(pool):
        await filled(pool, shelf, "a")
        async with pool.through("a") as old:
            with pytest.raises(BankError, match="served already"):
                await pool.add("a", shelf / "adapters" / "b")
            await pool.add("a", shelf / "adapters" / "b", replace=True)
            async with pool.through("a") as new:
                assert old.digest != new.digest
                assert new.digest == read_adapter(shelf / "adapters" / "b").digest()
                assert {old.key, new.key} == set(pool.engine.bank.names)
        while old.key in pool.engine.bank:
            await asyncio.sleep(0.01)
        assert pool.resident == ("a",)

    with pooled(shelf) as pool:
        asyncio.run(asyncio.wait_for(go(pool), 30))


def test_one_that_broke_on_the_disk_takes_no_room(shelf, tmp_path):
    async def go(pool):
        await filled(pool, shelf, "ab")
        shutil.copytree(shelf / "adapters" / "dora", tmp_path / "c")
        await pool.add("c", tmp_path / "c")
        await held(pool, "c")
        await held(pool, "a")
        await held(pool, "b")
        (tmp_path / "c" / "adapter_model.safetensors").unlink()
        for _ in range(5):
            with pytest.raises(AdapterFileError):
                await held(pool, "c")
        assert [(await held(pool, name)).key in pool.engine.bank for name in "abab"] == [True] * 4

    with pooled(shelf) as pool:
        asyncio.run(go(pool))


def test_who_leaves_while_an_adapter_is_read_pins_nothing(shelf):
    async def go(pool):
        await filled(pool, shelf)
        for _ in range(20):
            tasks = [asyncio.create_task(held(pool, name)) for name in "abc"]
            await asyncio.sleep(0.002)
            for task in tasks[:2]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        found = [await held(pool, name) for name in "abc"]
        assert len({one.digest for one in found}) == 3
        assert len(pool.engine.bank.names) <= 2

    with pooled(shelf, patience=20) as pool:
        asyncio.run(go(pool))


def test_what_two_adapters_may_not_share_is_told_when_the_second_comes(shelf, tmp_path):
    write_adapter(tmp_path / "whole", shelf / "model", targets=("q_proj",), modules_to_save=("lm_head",))

    async def go(pool):
        await pool.add("head", shelf / "adapters" / "head")
        with pytest.raises(BankError, match="'lm_head'"):
            await pool.add("whole", tmp_path / "whole")
        assert pool.names == ("head",)

    with pooled(shelf) as pool:
        asyncio.run(go(pool))


def test_parts_that_are_in_each_others_way():
    whole, site, row = (Parts(**{kind: frozenset({"m.x"})}) for kind in ("whole", "sites", "rows"))
    inner = Parts(whole=frozenset({"m"}))
    near = Parts(whole=frozenset({"m.xy"}))
    clashes = [(whole, site), (whole, row), (site, row), (whole, inner), (inner, site)]
    for one, other in clashes:
        assert one.clash(other) == other.clash(one) == "m.x"
    for one, other in [(whole, whole), (site, site), (row, row), (near, site), (near, whole)]:
        assert one.clash(other) is None
        assert other.clash(one) is None


def test_tokens_of_its_own_are_no_matter_of_a_shared_base(shelf, tmp_path):
    base = load_base(shelf / "model", dtype="float32", device="cpu")
    with Bank(base.model) as bank:
        fresh = (len(base.tokenizer), len(base.tokenizer) + 1)
        trained(bank, "x", LoraSpec(rank=2, alpha=4, targets=("q_proj",), new_tokens=fresh))
        bank.save("x", tmp_path / "x")

    async def go(pool):
        with pytest.raises(AdapterMismatchError, match="tokens of its own"):
            await pool.add("x", tmp_path / "x")

    with pooled(shelf) as pool:
        asyncio.run(go(pool))


def test_a_whole_folder_of_nonsense_is_refused(shelf, tmp_path):
    weights = load_file(shelf / "adapters" / "a" / "adapter_model.safetensors")
    strange = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    for name, change in (("more", {strange: torch.ones(4, 32)}),):
        shutil.copytree(shelf / "adapters" / "a", tmp_path / name)
        save_file(weights | change, tmp_path / name / "adapter_model.safetensors")

    async def go(pool):
        with pytest.raises(AdapterFileError):
            await pool.add("more", tmp_path / "more")
        for name in ("", "../a", "a b", "x" * 65):
            with pytest.raises(BankError):
                await pool.add(name, shelf / "adapters" / "a")
        assert pool.names == ()

    with pooled(shelf) as pool:
        asyncio.run(go(pool))


def test_no_room_at_all_is_no_pool(shelf):
    with pytest.raises(SpecError, match="1 or more"), pooled(shelf, resident=0):
        pass


def test_links_out_of_the_folder_do_not_lead_out(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="not in the folder"):
        allowed_folder("link", tmp_path / "in")
    assert allowed_folder("link", tmp_path / "in", any_path=True) == tmp_path
    with pytest.raises(ValueError, match="no adapters can be loaded"):
        allowed_folder("x", None)
