"""Who is computed when: first come first served, nobody starves, nothing is promised that there is no room for."""

from rankwise.serving.cache import BLOCK, Blocks
from rankwise.serving.requests import Wanted
from rankwise.serving.scheduler import Live, Part, Scheduler


def live(size: int, count: int = 4, name: str | None = None, digest: str = "", first: int = 0) -> Live:
    wanted = Wanted((first, *range(1, size)), name, max_new_tokens=count, digest=digest)
    return Live(wanted, lambda what: None)


def stepped(scheduler: Scheduler) -> list[tuple[Live, int]]:
    """A step: who is computed, how many tokens; who has all computed is given a next one."""
    parts = scheduler.plan()
    found = [(part.live, part.stop - part.live.computed) for part in parts]
    asking = [part.live for part in parts if part.stop == len(part.live.tokens)]
    scheduler.advance(parts)
    for one in asking:
        one.tokens.append(7)
        if one.answered == one.wanted.max_new_tokens:
            scheduler.leave(one)
    return found


def test_a_long_prompt_goes_in_parts_and_answers_go_on_beside_it():
    scheduler = Scheduler(Blocks(100), 256)
    short, long = live(10, 50), live(600, 4, first=9)
    scheduler.waiting.append(short)
    assert stepped(scheduler) == [(short, 10)]
    scheduler.waiting.append(long)
    for _ in range(18):
        computed = dict(stepped(scheduler))
        assert computed[short] == 1
        assert computed[long] == 32  # an eighth of a step
    assert dict(stepped(scheduler)) == {short: 1, long: 24}
    assert dict(stepped(scheduler)) == {short: 1, long: 1}


def test_alone_a_prompt_has_the_whole_step():
    scheduler = Scheduler(Blocks(100), 256)
    long = live(600)
    scheduler.waiting.append(long)
    assert [stepped(scheduler)[0][1] for _ in range(3)] == [256, 256, 88]


def test_the_first_that_has_no_room_lets_nobody_past():
    scheduler = Scheduler(Blocks(4), 256)
    first, large, small = live(30, 3), live(40, 20, first=1), live(3, 3, first=2)
    scheduler.waiting.extend([first, large, small])
    assert [one for one, _ in stepped(scheduler)] == [first]
    assert list(scheduler.waiting) == [large, small]
    while first in scheduler.running:
        assert [one for one, _ in stepped(scheduler)] == [first]
    assert {one for one, _ in stepped(scheduler)} == {large}
    scheduler.leave(large)
    assert {one for one, _ in stepped(scheduler)} == {small}
    assert scheduler.blocks.available == 3


def test_a_beginning_that_is_computed_in_a_step_serves_the_next_in_it():
    scheduler = Scheduler(Blocks(20), 256)
    first, second, other = live(40), live(40), live(40, name="a", digest="d")
    scheduler.waiting.extend([first, second, other])
    assert dict(stepped(scheduler)) == {first: 40, second: 8, other: 40}
    assert second.blocks[:2] == first.blocks[:2]
    assert not set(other.blocks) & set(first.blocks)


def test_of_an_adapter_without_a_digest_nothing_is_shared():
    scheduler = Scheduler(Blocks(20), 256)
    first, second = live(40, name="a"), live(40, name="a")
    scheduler.waiting.extend([first, second])
    assert dict(stepped(scheduler)) == {first: 40, second: 40}


def test_what_a_failed_step_computed_is_forgotten():
    scheduler = Scheduler(Blocks(20), 256)
    scheduler.waiting.append(one := live(40))
    assert len(scheduler.plan()) == 1
    scheduler.leave(one, spoilt=True)
    assert scheduler.blocks.known("", one.tokens)[0] == []
    assert (scheduler.running, scheduler.blocks.available) == ([], 20)


def test_neighbours_in_a_step_share_an_adapter():
    scheduler = Scheduler(Blocks(20), 256)
    scheduler.waiting.extend(live(5, name=name, first=i) for i, name in enumerate(["b", None, "a", "b", "a"]))
    assert [part.live.wanted.adapter for part in scheduler.plan()] == [None, "a", "a", "b", "b"]


def test_a_chunk_is_what_the_engine_is_told():
    one = live(40, name="a")
    one.computed, one.blocks = 16, [3, 4, 5]
    chunk = Part(one, 20).chunk()
    assert (list(chunk.tokens), chunk.seen, chunk.adapter, chunk.asks) == ([16, 17, 18, 19], 20, "a", False)
    assert Part(one, 40).chunk().asks
    assert one.room == 3 == -(-43 // BLOCK)
